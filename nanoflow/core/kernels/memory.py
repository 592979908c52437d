"""Memory for rows that a product is to read in whole tiles."""

from __future__ import annotations

import torch

TILE = 64  # rows


def empty_rows(num_rows: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.empty((num_rows, *shape))`, but with memory behind it up to a multiple of `TILE` rows."""
    return torch.empty((-(-num_rows // TILE) * TILE, *shape), dtype=dtype, device=device)[:num_rows]


def rows_in_memory(x_MK: torch.Tensor) -> int:
    """How many rows there are from the first one of x on to the end of the memory that x is a part of."""
    size = x_MK.untyped_storage().nbytes() // x_MK.dtype.itemsize - x_MK.storage_offset()
    return (size - x_MK.shape[1]) // x_MK.stride(0) + 1
