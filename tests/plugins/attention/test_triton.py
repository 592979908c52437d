"""The Triton backend's host side, and its kernels in Triton's interpreter; `tests/gpu` runs them on a GPU.

Triton decides when it is imported whether it interprets, so the kernels are tried in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoflow.core.interfaces import NoOptions
from nanoflow.plugins.attention import nanoflow_attention_backends
from tests.plugins.attention.batches import context

pytest.importorskip("triton")


def test_kernels_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted.py")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr


def test_tiles_cover_each_query_once_longest_first() -> None:
    from nanoflow.plugins.attention.triton_prefill import list_tiles

    query_lens, context_lens = np.array([1, 1, 70, 2, 33]), np.array([9, 4, 100, 50, 33])
    tiles = list_tiles(query_lens, context_lens, 2, 16)
    covered = sorted(place for _, first, count, _ in tiles.tolist() for place in range(first, first + count))
    assert covered == list(range(105))
    assert (np.diff(tiles[:, 3]) <= 0).all()
    for seq, first, _, seen in tiles.tolist():
        start = query_lens[2:seq].sum()
        assert seen == context_lens[seq] - query_lens[seq] + (first - start) + 1


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
