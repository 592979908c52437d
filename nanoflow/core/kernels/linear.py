"""Matrix products with few rows, which are as fast as the weights can be read.

Decoding multiplies 1 to some 64 rows with every weight of the model. That reads memory and computes next to nothing,
so that what counts is to have enough reads in flight on every multiprocessor, from the first moment on. Two kernels:
one for a single row without tensor cores, and one for a few rows, padded to what tensor cores take.

Both can take in what stands around a product in a transformer: `gate`, SiLU of the first half of the outputs times the
second half, and the single-row one also residual addition and RMS norm before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gate import gated
from nanoflow.core.kernels.launch import overlap


@dataclass(frozen=True)
class Vector:
    """How to run the single-row kernel: `rows` of W a program, `columns` of them at a time."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Tile:
    """How to run the kernel for a few rows.

    Attributes:
        rows: of W a program, at least 16.
        columns: of them at a time.
        splits: programs that share the columns; more than one leaves as many summands.
        num_stages: of the pipeline of loads.
        prefetch: whether to fetch a program's weights into L2 while the kernel before still runs.
    """

    rows: int
    columns: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: bool = True


def vector_linear(
    x_K: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, setting: Vector, *, gate: bool = False,
    norm: tuple[torch.Tensor, float] | None = None, residual_K: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """W norm(x + residual) + b for one row, and the new residual.

    Args:
        x_K: contiguous.
        weight_NK: its last dim is contiguous.
        bias_N: None for 0.
        setting: see there.
        gate: whether the result is silu(y[: N / 2]) * y[N / 2 :].
        norm: weight and epsilon of the RMS norm, None for none.
        residual_K: what to add to x first, only with `norm`; None for 0.

    Returns:
        y [N] or [N / 2], and x + residual [K] (None without a residual).
    """
    num_rows, size = weight_NK.shape
    num_outputs = num_rows // 2 if gate else num_rows
    y = torch.empty(num_outputs, dtype=x_K.dtype, device=x_K.device)
    total = None if residual_K is None else torch.empty_like(x_K)
    norm_weight, eps = norm if norm is not None else (None, 0.0)
    _vector[(triton.cdiv(num_outputs, setting.rows),)](
        x_K, residual_K, norm_weight, weight_NK, bias_N, y, total, num_outputs, size, eps, weight_NK.stride(0),
        NORM=norm is not None, ADD=residual_K is not None, GATE=gate, BIAS=bias_N is not None,
        ROWS=setting.rows, COLUMNS=setting.columns, num_warps=setting.num_warps, **overlap(x_K),
    )  # fmt: skip
    return y, total


def tile_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, setting: Tile, *, gate: bool = False
) -> torch.Tensor:
    """x Wᵀ + b for up to 128 rows, [M, N]; [M, N / 2] with `gate`; [splits, M, N] float32 summands if there are several.

    x's and W's last dims are contiguous. Several splits go with neither gate nor bias.
    """
    num_rows, size = x_MK.shape
    num_outputs = weight_NK.shape[0] // 2 if gate else weight_NK.shape[0]
    assert setting.splits == 1 or (not gate and bias_N is None)
    if setting.splits == 1:
        y = torch.empty((num_rows, num_outputs), dtype=x_MK.dtype, device=x_MK.device)
    else:
        y = torch.empty((setting.splits, num_rows, num_outputs), dtype=torch.float32, device=x_MK.device)
    part = triton.cdiv(triton.cdiv(size, setting.splits), setting.columns) * setting.columns
    _tile[(triton.cdiv(num_outputs, setting.rows), setting.splits)](
        x_MK, weight_NK, bias_N, y, num_rows, num_outputs, size, part, x_MK.stride(0), weight_NK.stride(0),
        GATE=gate, BIAS=bias_N is not None, SPLITS=setting.splits, EVEN=size % part == 0,
        M=max(16, triton.next_power_of_2(num_rows)), ROWS=setting.rows, COLUMNS=setting.columns,
        PREFETCH=setting.prefetch, num_warps=setting.num_warps, num_stages=setting.num_stages, **overlap(x_MK),
    )  # fmt: skip
    return y


@triton.jit
def _vector(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, num_outputs, size, eps, stride,
    NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (row < num_outputs)[:, None]
    column = tl.arange(0, COLUMNS)
    weights = weight_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    second_half = num_outputs.to(tl.int64) * stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    inside = exists & (column < size)[None, :]
    weight = tl.load(weights, mask=inside, other=0.0)  # in flight while the kernel before ends
    if GATE:
        up_weight = tl.load(weights + second_half, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype = y_ptr.dtype.element_ty
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, COLUMNS):
        place = start + column
        x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        if ADD:
            rounded = (x + tl.load(residual_ptr + place, mask=place < size, other=0.0).to(tl.float32)).to(dtype)
            tl.store(total_ptr + place, rounded, mask=(place < size) & (tl.program_id(0) == 0))
            x = rounded.to(tl.float32)
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
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < num_outputs, other=0.0).to(tl.float32)
        if GATE:
            up += tl.load(bias_ptr + num_outputs + row, mask=row < num_outputs, other=0.0).to(tl.float32)
    result = y.to(dtype)
    if GATE:
        result = gated(result, up.to(dtype))
    tl.store(y_ptr + row, result, mask=row < num_outputs)


@triton.jit
def _tile(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_outputs, size, part, x_stride, weight_stride,
    GATE: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, M)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first, split = tl.program_id(1) * part, tl.program_id(1)
    # Rows past the end read the last one; their results are not stored.
    weight_row = weight_ptr + tl.minimum(row, num_outputs - 1).to(tl.int64) * weight_stride + first
    second_half = num_outputs.to(tl.int64) * weight_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            _prefetch(weight_row, tl.minimum(part, size - first) * 2)
            if GATE:
                _prefetch(weight_row + second_half, tl.minimum(part, size - first) * 2)
        tl.extra.cuda.gdc_wait()
    xs = x_ptr + token.to(tl.int64)[:, None] * x_stride + first + column[None, :]
    weights = weight_row[None, :] + column[:, None]
    sums = tl.zeros((M, ROWS), tl.float32)
    up_sums = tl.zeros((M, ROWS), tl.float32)
    for start in range(0, part, COLUMNS):
        if EVEN:
            x = tl.load(xs + start, mask=(token < num_rows)[:, None], other=0.0)
            weight = tl.load(weights + start)
        else:
            inside = first + start + column < size
            x = tl.load(xs + start, mask=(token < num_rows)[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weights + start, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if GATE:
            if EVEN:
                up_weight = tl.load(weights + second_half + start)
            else:
                up_weight = tl.load(weights + second_half + start, mask=inside[:, None], other=0.0)
            up_sums = tl.dot(x, up_weight, up_sums, input_precision="ieee")
    stored = (token < num_rows)[:, None] & (row < num_outputs)[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=row < num_outputs, other=0.0).to(tl.float32)[None, :]
        if GATE:
            up_sums += tl.load(bias_ptr + num_outputs + row, mask=row < num_outputs, other=0.0).to(tl.float32)[None, :]
    result = sums.to(y_ptr.dtype.element_ty)
    if GATE:
        result = gated(result, up_sums.to(y_ptr.dtype.element_ty))
    place = (split.to(tl.int64) * num_rows + token[:, None]) * num_outputs + row[None, :]
    tl.store(y_ptr + place, result, mask=stored)


@triton.jit
def _prefetch(addresses, num_bytes):
    """Ask for `num_bytes` (a multiple of 16) at each address to be brought into L2."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [addresses.to(tl.int64), (addresses.to(tl.int64) * 0 + num_bytes).to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
