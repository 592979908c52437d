"""What the attention kernels share: tiles of keys in a paged cache."""

from __future__ import annotations

import triton
import triton.language as tl

# Scores of hidden tokens. Finite, so that a tile in which all are hidden gives no NaN.
HIDDEN = tl.constexpr(-1.0e30)
LOG2_E = 1.4426950408889634


@triton.jit
def tiles_before_window(context_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many leading tiles of a context its last token doesn't see; `WINDOW` is 0 where it sees all."""
    tiles = context_len * 0
    if WINDOW > 0:
        tiles = tl.maximum(context_len - WINDOW, 0) // BLOCK_N
    return tiles


@triton.jit
def block_ids(table_ptr, token, length, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of tokens `token` to `token + BLOCK_N`: one id if a block holds them all, else one for each token."""
    if P >= BLOCK_N:
        ids = tl.load(table_ptr + token // P, mask=token < length, other=0)
    else:
        tokens = token + tl.arange(0, BLOCK_N)
        ids = tl.load(table_ptr + tokens // P, mask=tokens < length, other=0)
    return ids
