"""A Triton kernel that reads an array and does next to nothing with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl

SETTINGS = [(block, warps, waves) for block in (2048, 8192) for warps in (4, 8) for waves in (4, 8)]


def readers(x: torch.Tensor) -> Iterator[Callable[[], object]]:
    """Calls that read all of the int32 array `x`, whose size is a multiple of 8192, each in its own way."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    for block, warps, waves in SETTINGS:
        sums = torch.empty(waves * processors, dtype=torch.int32, device=x.device)
        yield partial(read[(len(sums),)], x, sums, x.numel() // block, BLOCK=block, num_warps=warps)


@triton.jit
def read(x, sums, num_blocks, BLOCK: tl.constexpr):
    """sums[p] = sum of blocks p, p + programs, p + 2 * programs, ... of x."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(x + block * BLOCK + offsets)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
