"""The Triton backend's host side: what it serves, and when it is chosen."""

from __future__ import annotations

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
