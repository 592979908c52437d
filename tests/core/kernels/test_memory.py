"""Rows with memory behind them."""

from __future__ import annotations

import pytest
import torch

from nanoflow.core.kernels.memory import empty_rows, rows_in_tiles


@pytest.mark.parametrize(("num_rows", "in_tiles"), [(1, 64), (64, 64), (65, 128)])
def test_memory_goes_on_to_the_end_of_a_tile(num_rows: int, in_tiles: int) -> None:
    x = empty_rows(num_rows, 2, 8, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert x.shape == (num_rows, 2, 8)
    assert x.dtype == torch.bfloat16
    assert rows_in_tiles(x.flatten(1), 64) == in_tiles


@pytest.mark.parametrize(
    ("x", "in_tiles"),
    [
        (torch.empty(5, 8), 5),  # a tile would end in somebody else's memory
        (torch.empty(8, 8), 8),
        (torch.empty(8, 8)[:5], 8),
        (torch.empty(8, 8)[1:6], 5),
        (torch.empty(8, 10)[:5, :8], 8),
        (torch.empty(8 * 10 - 2).as_strided((5, 8), (10, 1)), 8),  # the last row needs no gap behind it
        (torch.empty(8 * 10 - 3).as_strided((5, 8), (10, 1)), 5),
    ],
)
def test_rows_up_to_the_end_of_a_tile(x: torch.Tensor, in_tiles: int) -> None:
    assert rows_in_tiles(x, 8) == in_tiles
