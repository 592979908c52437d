"""Memory behind the rows of tensors, so that GEMMs may read them in whole tiles."""

from __future__ import annotations

import torch

TILE = 64  # rows


def empty_rows(num_rows: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.empty((num_rows, *shape))`, but with memory behind it up to a multiple of `TILE` rows."""
    return torch.empty((_rounded_up(num_rows, TILE), *shape), dtype=dtype, device=device)[:num_rows]


def rows_in_tiles(x_MK: torch.Tensor, tile: int) -> int:
    """How many rows there are up to the end of x's last tile of so many; M, if x's memory ends before."""
    num_rows = _rounded_up(len(x_MK), tile)
    end = x_MK.storage_offset() + (num_rows - 1) * x_MK.stride(0) + x_MK.shape[1]
    return num_rows if end * x_MK.dtype.itemsize <= x_MK.untyped_storage().nbytes() else len(x_MK)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
