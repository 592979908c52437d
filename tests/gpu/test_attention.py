"""Every built-in attention backend on a GPU: the kit's suite, and batches as large as a GPU likes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.testing import AttentionBackendSuite
from nanoflow.testing.batches import Case, context

DEVICE = torch.device("cuda")
BLOCK_SIZES = (16, 64, 256)


def large_cases(block_size: int) -> list[Case]:
    rng = np.random.default_rng(block_size)

    def lengths(count: int, most: int) -> list[int]:
        return rng.integers(1, most, count).tolist()

    return [
        Case.draw(rng, block_size, [3000]),
        Case.draw(rng, block_size, lengths(37, 1500)),
        Case.draw(rng, block_size, lengths(200, 300), shared=2),
        Case.draw(rng, block_size, [], [(300, 0), (128, 0), (2, 700), (77, 500), (513, 64)]),
        Case.draw(rng, block_size, lengths(9, 800), [(2, 0), (200, 333), (64, 1024), (1000, 0)], shared=1),
    ]


class LargeBatches(AttentionBackendSuite):
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("group", [1, 2, 4, 8])
    def test_large_batches(self, group: int, head_dim: int, dtype: torch.dtype) -> None:
        for block_size in BLOCK_SIZES:
            for case in large_cases(block_size):
                self.check(context(group, head_dim, block_size, dtype, DEVICE), case)

    @pytest.mark.parametrize("window", [1, 30, 64, 500, 4096])
    def test_large_windows(self, window: int, dtype: torch.dtype) -> None:
        """In one layer of two."""
        for block_size in BLOCK_SIZES:
            for case in large_cases(block_size):
                self.check(context(4, 128, block_size, dtype, DEVICE, windows=(window, None)), case)


class TestTorch(AttentionBackendSuite):
    component = "torch"


class TestTriton(LargeBatches):
    component = "triton"

    @pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
    def test_large_projections(self, group: int, dtype: torch.dtype) -> None:
        rng = np.random.default_rng(0)
        for block_size in BLOCK_SIZES:
            for count in (1, 2, 9, 24):
                case = Case.draw(rng, block_size, rng.integers(1, 900, count).tolist())
                self.check_projection(context(group, 128, block_size, dtype, DEVICE), case, normed=count != 9)


FINITE = 3e3  # FlashAttention multiplies what it masks by zero


class TestFlash(LargeBatches):
    component = "flash"
    garbage = FINITE


@pytest.mark.parametrize("num_splits", [1, 3, 16])
def test_splits(num_splits: int) -> None:
    suite = type("Split", (TestFlash,), {"options": {"num_splits": num_splits}})()
    for case in large_cases(256):
        suite.check(context(2, 128, 256, torch.bfloat16, DEVICE), case)


class TestHybrid(LargeBatches):
    component = "hybrid"
    garbage = FINITE
