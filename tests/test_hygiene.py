"""What no test may do is noticed."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests import hygiene


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("Skipped: could not import 'triton': No module named 'triton'", "failed"),
        ("Skipped: the package triton is not installed: pip install triton", "failed"),
        ("Skipped: could not import 'lm_eval': No module named 'lm_eval'", "skipped"),
        ("Skipped: there is no GPU", "skipped"),
    ],
)
def test_in_ci_no_package_may_be_missing(reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report: Any = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("test_it.py", 3, reason))
    monkeypatch.delenv("CI", raising=False)
    assert hygiene.forbid_missing_packages(report).outcome == "skipped"
    monkeypatch.setenv("CI", "true")
    assert hygiene.forbid_missing_packages(report).outcome == outcome


def test_threads_and_processes_that_are_left() -> None:
    leftovers = hygiene.Leftovers(patience=0)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    thread.start()
    left = leftovers.take()
    again = leftovers.take()
    end.set()
    thread.join()
    process.communicate(b"\n")
    assert "thread forgotten" in left
    if sys.platform == "linux":
        assert any(name.startswith(f"process {process.pid} ") for name in left)
    assert again == []
