"""GEMV: one row of x, without tensor cores, as fast as the weights can be read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.settings import GemvConfig
from nanoflow.core.kernels.gemm.tiling import finished
from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait


def gemv(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, config: GemvConfig, *, gate: bool = False,
    norm: tuple[torch.Tensor, float] | None = None, residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """W norm(x) + b for one row, added to `residual_MN` if there is one, which is overwritten and returned.

    Args:
        x_MK: M = 1; contiguous, as the residual.
        weight_NK: its last dim is contiguous.
        bias_N: None for 0.
        config: see there.
        gate: whether the result is silu(y[: N / 2]) * y[N / 2 :]; not with a residual.
        norm: weight and epsilon of the RMS norm, None for none.
        residual_MN: None for none.
    """
    num_rows, size = weight_NK.shape
    num_outputs = num_rows // 2 if gate else num_rows
    y = residual_MN
    if y is None:
        y = torch.empty((1, num_outputs), dtype=x_MK.dtype, device=x_MK.device)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    _gemv[(triton.cdiv(num_outputs, config.rows),)](
        x_MK, norm_weight, weight_NK, bias_N, y, num_outputs, size, eps, weight_NK.stride(0),
        NORM=norm is not None, ADD=residual_MN is not None, GATE=gate, BIAS=bias_N is not None,
        ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps, **pdl_options(x_MK),
    )  # fmt: skip
    return y


@triton.jit
def _gemv(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, num_outputs, size, eps, stride,
    NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (row < num_outputs)[:, None]
    column = tl.arange(0, COLUMNS)
    weights = weight_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    second_half = num_outputs.to(tl.int64) * stride
    inside = exists & (column < size)[None, :]
    pdl_launch(PDL)
    weight = tl.load(weights, mask=inside, other=0.0)  # in flight while the kernel before ends
    if GATE:
        up_weight = tl.load(weights + second_half, mask=inside, other=0.0)
    pdl_wait(PDL)
    dtype = y_ptr.dtype.element_ty
    if ADD:
        residual = tl.load(y_ptr + row, mask=row < num_outputs, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, COLUMNS):
        place = start + column
        x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        sums += weight.to(tl.float32) * x[None, :]
        inside = exists & (place + COLUMNS < size)[None, :]
        weight = tl.load(weights + start + COLUMNS, mask=inside, other=0.0)
        if GATE:
            up_sums += up_weight.to(tl.float32) * x[None, :]
            up_weight = tl.load(weights + second_half + start + COLUMNS, mask=inside, other=0.0)
    y = tl.sum(sums, 1)
    up = tl.sum(up_sums, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / size + eps)
        y *= scale
        up *= scale
    y = finished(y, up, bias_ptr, row, num_outputs, dtype, GATE, BIAS)
    if ADD:
        y = (y.to(tl.float32) + residual).to(dtype)
    tl.store(y_ptr + row, y, mask=row < num_outputs)
