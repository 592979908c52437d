"""The Triton backend's host side: what it serves, and when it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention import nanoflow_attention_backends
from nanoflow.testing.batches import context

pytest.importorskip("triton")


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


@pytest.mark.slow
def test_the_interpreter_runs_the_bundled_model() -> None:
    """Prefill beside decodes, and decodes alone, as a learner without a GPU would step through them."""
    command = [
        sys.executable,
        "-m",
        "nanoflow",
        "run",
        "attention=triton",
        "engine.device=cpu",
        "sampling.temperature=0",
    ]
    command += ["prompts=[HAMLET,Who is there]", "sampling.max_tokens=3", "scheduler.max_num_batched_tokens=4",
                "scheduler.max_num_seqs=4"]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    command[4] = "attention=torch"
    expected = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert process.stdout.partition("bard |")[0] == expected.partition("bard |")[0]
