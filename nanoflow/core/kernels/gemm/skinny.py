"""Skinny GEMM, 2 to 8 rows of x: a program has all columns of its rows of W, and no loop.

Where a GEMM takes a few microseconds, the time goes into waiting for its first loads. So a program brings its part
of W, tens of kilobytes, into shared memory before the kernel before has ended, and has then to wait for the rows of x
alone. Warps share the columns and add up in the end. The operands are exchanged, for tensor cores want 16 rows of the
first, but only 8 of the second.

A GEMM can take in the norm before it, which every program works out anew, or the residual's addition behind it. Or
several programs share the columns of a row of W, and leave a partial sum each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.settings import SkinnyConfig
from nanoflow.core.kernels.gemm.tiling import finished
from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait

MOST_ROWS = 8  # of x


def skinny_gemm(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, config: SkinnyConfig, *,
    gate: bool = False, norm: tuple[torch.Tensor, float] | None = None,
    residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """W norm(x) + b for at most 8 rows, added to `residual_MN` if there is one, which is overwritten and returned.

    With several splits, which go with nothing else, as many float32 partials [C, M, N].

    Args:
        x_MK: its last dim is contiguous. With a norm, x times its weight has to fit x's dtype.
        weight_NK: 16-bit; its last dim is contiguous.
        bias_N: None for 0.
        config: see there.
        gate: whether the result is silu(y[:, : N / 2]) * y[:, N / 2 :]; not with a residual.
        norm: weight and epsilon of the RMS norm, None for none.
        residual_MN: any row stride.
    """
    num_rows, size = x_MK.shape
    num_outputs = weight_NK.shape[0] // 2 if gate else weight_NK.shape[0]
    y = residual_MN
    if config.splits > 1:
        assert norm is residual_MN is bias_N is None
        assert not gate
        y = torch.empty((config.splits, num_rows, num_outputs), dtype=torch.float32, device=x_MK.device)
    elif y is None:
        y = torch.empty((num_rows, num_outputs), dtype=x_MK.dtype, device=x_MK.device)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    columns = triton.next_power_of_2(triton.cdiv(size, config.splits))
    _skinny_gemm[(triton.cdiv(num_outputs, config.rows), config.splits)](
        x_MK, norm_weight, weight_NK, bias_N, y, num_rows, num_outputs, size, eps,
        x_MK.stride(0), weight_NK.stride(0), y.stride(-2),
        NORM=norm is not None, ADD=residual_MN is not None, GATE=gate, BIAS=bias_N is not None, M=MOST_ROWS,
        ROWS=config.rows, PARTS=config.num_warps, COLUMNS=columns // config.num_warps,
        num_warps=config.num_warps, **pdl_options(x_MK),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_gemm(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_outputs, size, eps, x_stride, weight_stride, y_stride,
    NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    column = tl.arange(0, PARTS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :] + split * PARTS * COLUMNS
    inside = column < size
    # Rows past the end read the last one; their results are not stored.
    weight_row = weight_ptr + tl.minimum(row, num_outputs - 1).to(tl.int64) * weight_stride
    weights = weight_row[None, :, None] + column[:, None, :]
    pdl_launch(PDL)
    weight = tl.load(weights, mask=inside[:, None, :], other=0.0)  # [parts, rows of W, columns]
    if GATE:
        to_up = num_outputs.to(tl.int64) * weight_stride
        up_weight = tl.load(weights + to_up, mask=inside[:, None, :], other=0.0)
    if NORM:
        factor = tl.load(norm_ptr + column, mask=inside, other=0.0)
    pdl_wait(PDL)
    dtype = y_ptr.dtype.element_ty
    token = tl.arange(0, M)
    there = token < num_rows
    place = (split.to(tl.int64) * num_rows + token[None, :]) * y_stride + row[:, None]
    stored = there[None, :] & (row < num_outputs)[:, None]
    xs = x_ptr + token.to(tl.int64)[None, :, None] * x_stride + column[:, None, :]
    x = tl.load(xs, mask=there[None, :, None] & inside[:, None, :], other=0.0)  # [parts, rows of x, columns]
    if ADD:
        residual = tl.load(y_ptr + place, mask=stored, other=0.0).to(tl.float32)
    if NORM:
        # Sums of squares are what x xᵀ has on its diagonal; tensor cores are faster at it than warps that add up.
        squares = tl.sum(tl.dot(x, tl.permute(x, (0, 2, 1)), input_precision="ieee"), 0)
        squares = tl.sum(tl.where(token[:, None] == token[None, :], squares, 0.0), 0)
        scale = tl.rsqrt(squares / size + eps)[None, :]
        x = (x.to(tl.float32) * factor.to(tl.float32)[:, None, :]).to(dtype)
    x = tl.permute(x, (0, 2, 1))
    y = tl.sum(tl.dot(weight, x, input_precision="ieee"), 0)  # [rows of W, rows of x]
    up = y
    if GATE:
        up = tl.sum(tl.dot(up_weight, x, input_precision="ieee"), 0)
    if NORM:
        y *= scale
        if GATE:
            up *= scale
    y = finished(y, up, bias_ptr, row[:, None], num_outputs, dtype, GATE, BIAS)
    if ADD:
        y = (y.to(tl.float32) + residual).to(dtype)
    tl.store(y_ptr + place, y, mask=stored)
