"""Tiled GEMM: few rows of x, up to 64, padded to what tensor cores take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.settings import TiledConfig
from nanoflow.core.kernels.gemm.tiling import cut, finished, gemm
from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait, prefetch


def tiled_gemm(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, config: TiledConfig, *, gate: bool = False
) -> torch.Tensor:
    """x Wᵀ + b for few rows, as `cut` has it. x's and W's last dims are contiguous."""
    num_rows, size = x_MK.shape
    y, part, grid = cut(x_MK, weight_NK, bias_N, config, gate=gate)
    _tiled_gemm[grid](
        x_MK, weight_NK, bias_N, y, num_rows, y.shape[-1], size, part, x_MK.stride(0), weight_NK.stride(0),
        GATE=gate, BIAS=bias_N is not None, EVEN=size % part == 0, M=config.tokens, ROWS=config.rows,
        COLUMNS=config.columns, PREFETCHED=min(4096, triton.next_power_of_2(part)) if config.prefetch else 0,
        num_warps=config.num_warps, num_stages=config.num_stages, **pdl_options(x_MK),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])  # which no address along a row of memory depends on
def _tiled_gemm(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_outputs, size, part, x_stride, weight_stride,
    GATE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFETCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch(PDL)
    token = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first, split = tl.program_id(2) * part, tl.program_id(2)
    # Rows past the end read the last one; their results are not stored.
    weight_row = weight_ptr + tl.minimum(row, num_outputs - 1).to(tl.int64) * weight_stride + first
    second_half = num_outputs.to(tl.int64) * weight_stride
    if PDL and PREFETCHED > 0:
        line = tl.minimum(tl.arange(0, PREFETCHED // 64) * 64, tl.minimum(part, size - first) - 1)
        prefetch(weight_row[:, None] + line[None, :])
        if GATE:
            prefetch(weight_row[:, None] + second_half + line[None, :])
    pdl_wait(PDL)
    xs = x_ptr + token.to(tl.int64)[:, None] * x_stride + first + column[None, :]
    weights = weight_row[None, :] + column[:, None]
    sums, up_sums = gemm(
        xs, token < num_rows, weights, second_half, size - first, part, M, ROWS, COLUMNS, GATE, EVEN
    )  # fmt: skip
    stored = (token < num_rows)[:, None] & (row < num_outputs)[None, :]
    result = finished(sums, up_sums, bias_ptr, row[None, :], num_outputs, y_ptr.dtype.element_ty, GATE, BIAS)
    place = (split.to(tl.int64) * num_rows + token[:, None]) * num_outputs + row[None, :]
    tl.store(y_ptr + place, result, mask=stored)
