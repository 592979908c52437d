"""Matrix products of a few rows, up to 64, padded to what tensor cores take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.tiling import HEAD, LARGE, Tiling, cut, finished, product
from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait, prefetch


@dataclass(frozen=True)
class Tile(Tiling):
    """How to run the kernel for a few rows.

    Attributes:
        ahead: whether a program asks for its part of W before the kernel before has ended.
    """

    ahead: bool = False


def tile_setting(num_rows: int, num_outputs: int, size: int, *, gate: bool, may_split: bool) -> Tile | None:
    """What was fastest on an H100 at the shapes of Qwen3 0.6B and 8B, inside a whole step; None stands for cuBLAS.

    For 32B, and for what 4 ranks have of 8B and 32B, what was fastest by itself. Neighbours matter: a kernel that
    leaves no shared memory for the next one's programs keeps them from starting early.
    """
    if num_rows > 64:
        return None
    is_large = num_outputs * size >= LARGE
    is_head = num_outputs >= HEAD and not gate
    tokens = max(16, triton.next_power_of_2(num_rows))
    if is_head:
        if num_rows > 32:
            return Tile(tokens, rows=64, columns=64, splits=1, num_warps=4, num_stages=6)
        return Tile(tokens, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)
    if may_split and num_outputs > 4224:
        return None  # more programs of 32 rows, one a multiprocessor, than there are multiprocessors
    if not gate and not may_split and 1024 < num_outputs < 3072 and size > 1024:
        return None  # too few of them
    if gate and size > 4096:
        if num_rows <= 16:
            return Tile(tokens, rows=32, columns=256, splits=1, num_warps=4, num_stages=4)
        return Tile(64, rows=64, columns=128, splits=1, num_warps=4, num_stages=4)
    if is_large and num_rows <= 16:
        if gate:
            return Tile(tokens, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)
        if may_split and size <= num_outputs:
            return Tile(tokens, rows=16, columns=256, splits=2, num_warps=2, num_stages=4)
        return Tile(64, rows=32, columns=128, splits=2 if may_split else 1, num_warps=4, num_stages=4)
    if gate:
        return Tile(64, rows=32, columns=128, splits=1, num_warps=4, num_stages=6 if num_rows <= 16 else 4)
    if not may_split and num_rows <= 16:
        return Tile(16, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)
    splits = max(1, triton.cdiv(128, triton.cdiv(num_outputs, 32))) if may_split else 1
    return Tile(64, rows=32, columns=128, splits=splits, num_warps=4, num_stages=6, ahead=may_split)


def tile_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, setting: Tile, *, gate: bool = False
) -> torch.Tensor:
    """x Wᵀ + b for few rows, as `cut` has it. x's and W's last dims are contiguous."""
    num_rows, size = x_MK.shape
    y, part, grid = cut(x_MK, weight_NK, bias_N, setting, gate=gate)
    _tile[grid](
        x_MK, weight_NK, bias_N, y, num_rows, y.shape[-1], size, part, x_MK.stride(0), weight_NK.stride(0),
        GATE=gate, BIAS=bias_N is not None, EVEN=size % part == 0, M=setting.tokens, ROWS=setting.rows,
        COLUMNS=setting.columns, AHEAD=min(4096, triton.next_power_of_2(part)) if setting.ahead else 0,
        num_warps=setting.num_warps, num_stages=setting.num_stages, **pdl_options(x_MK),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])  # which no address along a row of memory depends on
def _tile(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_outputs, size, part, x_stride, weight_stride,
    GATE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch(PDL)
    token = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first, split = tl.program_id(2) * part, tl.program_id(2)
    # Rows past the end read the last one; their results are not stored.
    weight_row = weight_ptr + tl.minimum(row, num_outputs - 1).to(tl.int64) * weight_stride + first
    second_half = num_outputs.to(tl.int64) * weight_stride
    if PDL and AHEAD > 0:
        line = tl.minimum(tl.arange(0, AHEAD // 64) * 64, tl.minimum(part, size - first) - 1)
        prefetch(weight_row[:, None] + line[None, :])
        if GATE:
            prefetch(weight_row[:, None] + second_half + line[None, :])
    pdl_wait(PDL)
    xs = x_ptr + token.to(tl.int64)[:, None] * x_stride + first + column[None, :]
    weights = weight_row[None, :] + column[:, None]
    sums, up_sums = product(
        xs, token < num_rows, weights, second_half, size - first, part, M, ROWS, COLUMNS, GATE, EVEN
    )  # fmt: skip
    stored = (token < num_rows)[:, None] & (row < num_outputs)[None, :]
    result = finished(sums, up_sums, bias_ptr, row[None, :], num_outputs, y_ptr.dtype.element_ty, GATE, BIAS)
    place = (split.to(tl.int64) * num_rows + token[:, None]) * num_outputs + row[None, :]
    tl.store(y_ptr + place, result, mask=stored)
