"""What no test may do: leave threads or processes behind, or be skipped in CI for a package that CI can install."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from pathlib import Path
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
MISSING = re.compile(r"could not import '(?P<module>\w+)|is not installed")
TOO_LARGE = ("lm_eval", "accelerate")  # for CI: not in the extra `test`
KEPT_BY_LIBRARIES = ("tqdm_monitor", "resource_tracker")  # until the process ends, in names and commands


def forbid_missing_packages(report: Report) -> Report:
    """In CI, a skip for want of a package is a failure."""
    if report.skipped and os.environ.get("CI") and isinstance(report.longrepr, tuple):
        found = MISSING.search(report.longrepr[2])
        if found and found["module"] not in TOO_LARGE:
            report.outcome, report.longrepr = "failed", f"CI lacks a package: {report.longrepr[2]}"
    return report


class Leftovers:
    """Threads and child processes that tests leave behind.

    Args:
        patience: seconds until those that have been told to end have ended.
    """

    def __init__(self, patience: float = 10) -> None:
        self.patience = patience
        self.known = set(running())

    def take(self) -> list[str]:
        """Those that are there now, each told once. Engines that nobody holds any more end with a collection."""
        deadline = time.monotonic() + self.patience
        while left := {key: name for key, name in running().items() if key not in self.known}:
            if time.monotonic() > deadline:
                self.known |= set(left)
                break
            gc.collect()
            time.sleep(0.02)
        return list(left.values())


def running() -> dict[int, str]:
    """Threads by identity and, where the system tells (Linux), child processes by id."""
    found = {id(thread): f"thread {thread.name}" for thread in threading.enumerate()}
    for file in Path("/proc/self/task").glob("*/children"):
        found |= {int(pid): f"process {pid} ({command(pid)})" for pid in file.read_text().split()}
    return {key: name for key, name in found.items() if not any(kept in name for kept in KEPT_BY_LIBRARIES)}


def command(pid: str) -> str:
    """What a process runs."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "ended"
