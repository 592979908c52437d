"""A backend with a mask of its own, which the suite compares with the mask that the test states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.plugins.attention.torch.backend import TorchAttention
from nanoflow.testing import AttentionBackendSuite
from tests.testing import planted

NUM_SINKS = 4


class SinkAttention(TorchAttention):
    """The first tokens stay visible to all later ones, whatever the window (attention sinks of StreamingLLM)."""

    num_sinks = NUM_SINKS

    def _bias(self, num_queries: int, context_lens_G: np.ndarray, window: int | None) -> torch.Tensor | None:
        bias = super()._bias(num_queries, context_lens_G, window)
        if bias is not None:
            causal = super()._bias(num_queries, context_lens_G, None)
            bias[..., : self.num_sinks] = 0 if causal is None else causal[..., : self.num_sinks]
        return bias


class OneSinkShort(SinkAttention):
    num_sinks = NUM_SINKS - 1


class SinkSuite(AttentionBackendSuite):
    component = planted.component(SinkAttention)
    shapes = [(2, 64, 16)]
    bounds = {torch.float32: 1e-5}

    def reference_mask(
        self, c: AttentionContext, layer: int, query_positions_Q: torch.Tensor, key_positions_L: torch.Tensor
    ) -> torch.Tensor:
        mask_QL = super().reference_mask(c, layer, query_positions_Q, key_positions_L)
        return mask_QL | (key_positions_L < NUM_SINKS) & (key_positions_L <= query_positions_Q.unsqueeze(1))


class TestSinks(SinkSuite):
    pass


@pytest.mark.parametrize(
    ("suite", "backend"),
    [(AttentionBackendSuite, SinkAttention), (SinkSuite, TorchAttention), (SinkSuite, OneSinkShort)],
    ids=["sinks where none are promised", "none where they are promised", "one too few"],
)
def test_another_mask_fails(suite: type[AttentionBackendSuite], backend: type) -> None:
    changes: dict[str, Any] = {"component": planted.component(backend), "bounds": SinkSuite.bounds}
    with pytest.raises(AssertionError, match="off by"):
        type("TestOther", (suite,), changes)().test_windows(16)
