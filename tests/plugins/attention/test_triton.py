"""The Triton backend's host side, and its kernels in Triton's interpreter; `tests/gpu` runs them on a GPU.

Triton decides when it is imported whether it interprets, so the kernels are tried in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention import nanoflow_attention_backends
from nanoflow.testing.batches import context

pytest.importorskip("triton")


def test_kernels_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted.py")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"block_size": 24}, "power of two from 16 on, not 24"), ({"block_size": 8}, "not 8"),
        ({"head_dim": 512}, "not 512"), ({"dtype": torch.float64}, "not torch.float64"),
        ({"device": torch.device("meta")}, "needs a GPU"), ({}, None),
    ],
)  # fmt: skip
def test_supports(changes: dict, part: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    component = next(c for c in nanoflow_attention_backends() if c.name == "triton")
    values = {"group": 2, "head_dim": 64, "block_size": 16} | changes
    reason = component.supports(NoOptions(), context(**values))
    assert (reason is None) if part is None else (reason is not None and part in reason)


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert next(c for c in nanoflow_attention_backends() if c.name == "triton").priority < 0
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert next(c for c in nanoflow_attention_backends() if c.name == "triton").priority > 0
