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
PATIENCE = 10  # seconds until threads and processes that have been told to end have ended
BEFORE = frozenset(threading.enumerate())  # the main thread, and that of xdist
OF_LIBRARIES = ("tqdm_monitor",)  # threads that libraries keep on purpose


def forbid_missing_packages(report: Report) -> Report:
    """In CI, a skip for want of a package is a failure."""
    if report.skipped and os.environ.get("CI") and isinstance(report.longrepr, tuple):
        found = MISSING.search(report.longrepr[2])
        if found and found["module"] not in TOO_LARGE:
            report.outcome, report.longrepr = "failed", f"CI lacks a package: {report.longrepr[2]}"
    return report


def leftovers() -> list[str]:
    """Threads and child processes that are still there, though whoever nobody holds any more was collected."""
    deadline = time.monotonic() + PATIENCE
    while left := threads() + children():
        if time.monotonic() > deadline:
            return left
        gc.collect()
        time.sleep(0.02)
    return []


def threads() -> list[str]:
    return [f"thread {t.name}" for t in threading.enumerate() if t not in BEFORE and t.name not in OF_LIBRARIES]


def children() -> list[str]:
    """Child processes by command, where the system tells (Linux)."""
    pids = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    return [f"process {pid} ({command(pid)})" for pid in pids]


def command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "ended"
