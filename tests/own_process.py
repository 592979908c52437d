"""Tests that run in a process of their own: those that need a Triton that compiles, where the others' interprets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INSIDE = "NANOFLOW_TEST_IN_OWN_PROCESS"
TIMEOUT = 180  # seconds, of which most tests need five


def run_in_own_process(item: pytest.Function) -> bool | None:
    """Run a test with the mark `own_process` in a pytest of its own, in which Triton doesn't interpret.

    Returns:
        True for a test that has passed there; None for one that is to be called here.
    """
    if item.get_closest_marker("own_process") is None or INSIDE in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", item.nodeid]
    options = {"cwd": item.config.rootpath, "env": os.environ | {INSIDE: "1", "TRITON_INTERPRET": "0"}}
    process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, **options)
    if process.returncode:
        pytest.fail(process.stdout + process.stderr, pytrace=False)
    return True
