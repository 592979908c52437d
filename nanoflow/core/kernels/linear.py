"""Matrix products with few rows, which are as fast as the weights can be read.

Decoding multiplies 1 to some 64 rows with every weight of the model. That reads memory and computes next to nothing,
so that what counts is to have enough reads in flight on every multiprocessor, from the first moment on. Two kernels:
one for a single row without tensor cores, whose first weights are on their way before the kernel before has ended, and
one for a few rows, padded to what tensor cores take. `few_rows` has a third, for 2 to 8 rows of small models, and
`many_rows` a fourth, for 65 to 256.

Both can take in what stands around a product in a transformer: `gate`, SiLU of the first half of the outputs times the
second half, and the single-row one also the RMS norm before it, or the residual's addition behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nanoflow.core.kernels.few_rows import few_linear, few_setting
from nanoflow.core.kernels.gate import silu_mul
from nanoflow.core.kernels.launch import has_room, let_next_start, overlap, prefetch, wait_for_previous
from nanoflow.core.kernels.many_rows import many_linear, many_setting
from nanoflow.core.kernels.memory import rows_in_tiles
from nanoflow.core.kernels.product import HEAD, LARGE, Tiling, cut, finished, product


@dataclass(frozen=True)
class Vector:
    """How to run the single-row kernel: `rows` of W a program, `columns` of them at a time."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Tile(Tiling):
    """How to run the kernel for a few rows.

    Attributes:
        ahead: whether a program asks for its part of W before the kernel before has ended.
    """

    ahead: bool = False


def linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, gate: bool = False,
    may_split: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ + b, with `gate` as in `vector_linear`, by the fastest way that is known for these shapes.

    With `may_split` the result may be [C, M, N] float32 summands.
    """
    num_rows, size = x_MK.shape
    if x_MK.dtype.itemsize == 2 and num_rows > 0 and size % 16 == 0:
        may_split = may_split and bias_N is None and not gate
        if (y := _in_one_go(x_MK, weight_NK, bias_N, gate=gate, may_split=may_split)) is not None:
            return y
        if has_room(x_MK.device):
            many = many_setting(num_rows, weight_NK.shape[0], size, gate=gate, may_split=may_split)
            if many is not None and rows_in_tiles(x_MK, many.tokens) % many.tokens == 0:
                return many_linear(x_MK, weight_NK, bias_N, many, gate=gate)
            tile = tile_setting(num_rows, weight_NK.shape[0], size, gate=gate, may_split=may_split)
            if tile is not None:
                return tile_linear(x_MK, weight_NK, bias_N, tile, gate=gate)
    y = F.linear(x_MK, weight_NK, bias_N)
    return silu_mul(y) if gate else y


def normed_linear(
    x_MK: torch.Tensor, norm_K: torch.Tensor, eps: float, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *,
    gate: bool,
) -> torch.Tensor | None:  # fmt: skip
    """`linear` of x's RMS norm in one kernel; None where two kernels are faster."""
    # Several rows not in float16, where x times the norm's weight, which comes before its scale, may be too large.
    if x_MK.dtype == torch.bfloat16 or (x_MK.dtype == torch.float16 and len(x_MK) == 1):
        return _in_one_go(x_MK, weight_NK, bias_N, gate=gate, norm=(norm_K, eps))
    return None


def added_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, residual_MN: torch.Tensor
) -> torch.Tensor | None:
    """`linear` added to the residual, in its place, in one kernel; None where two kernels are faster."""
    return _in_one_go(x_MK, weight_NK, bias_N, residual_MN=residual_MN) if x_MK.dtype.itemsize == 2 else None


def _in_one_go(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, gate: bool = False,
    norm: tuple[torch.Tensor, float] | None = None, residual_MN: torch.Tensor | None = None, may_split: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """As `vector_linear` for one row and `few_linear` for several; None where other kernels are faster."""
    num_outputs, size = weight_NK.shape
    if len(x_MK) == 1 and size % 16 == 0:
        vector = vector_setting(num_outputs, size, gate=gate, normed=norm is not None)
        return vector_linear(x_MK, weight_NK, bias_N, vector, gate=gate, norm=norm, residual_MN=residual_MN)
    setting = few_setting(len(x_MK), *weight_NK.shape, gate=gate, add=residual_MN is not None, may_split=may_split)
    if setting is None or not has_room(x_MK.device):
        return None
    return few_linear(x_MK, weight_NK, bias_N, setting, gate=gate, norm=norm, residual_MN=residual_MN)


def vector_setting(num_outputs: int, size: int, *, gate: bool, normed: bool) -> Vector:
    """What was fastest on an H100 at the shapes of Qwen3 0.6B to 14B, and of 8B and 32B split over up to 4 ranks."""
    if normed:
        if gate:
            return Vector(rows=2, columns=512, num_warps=1) if size <= 2048 else Vector(1, columns=1024, num_warps=4)
        return Vector(rows=4, columns=512, num_warps=1) if size <= 1024 else Vector(2, columns=1024, num_warps=4)
    if num_outputs <= 1024:
        if size == 2048:
            return Vector(rows=2, columns=2048, num_warps=4)
        return Vector(rows=2, columns=min(4096, triton.next_power_of_2(size)), num_warps=4)
    if size <= 1024:
        if num_outputs >= HEAD:
            return Vector(rows=2, columns=min(1024, triton.next_power_of_2(size)), num_warps=4)
        return Vector(rows=4, columns=512, num_warps=4)
    if size % 4096 == 0 and not gate:
        if num_outputs <= 2048:
            return Vector(rows=1, columns=2048, num_warps=4)
        return Vector(rows=2, columns=4096, num_warps=4)
    return Vector(rows=2, columns=1024, num_warps=4)


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


def vector_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, setting: Vector, *, gate: bool = False,
    norm: tuple[torch.Tensor, float] | None = None, residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """W norm(x) + b for one row, added to `residual_MN` if there is one, which is overwritten and returned.

    Args:
        x_MK: M = 1; contiguous, as the residual.
        weight_NK: its last dim is contiguous.
        bias_N: None for 0.
        setting: see there.
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
    _vector[(triton.cdiv(num_outputs, setting.rows),)](
        x_MK, norm_weight, weight_NK, bias_N, y, num_outputs, size, eps, weight_NK.stride(0),
        NORM=norm is not None, ADD=residual_MN is not None, GATE=gate, BIAS=bias_N is not None,
        ROWS=setting.rows, COLUMNS=setting.columns, num_warps=setting.num_warps, **overlap(x_MK),
    )  # fmt: skip
    return y


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
        num_warps=setting.num_warps, num_stages=setting.num_stages, **overlap(x_MK),
    )  # fmt: skip
    return y


@triton.jit
def _vector(
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
    let_next_start(PDL)
    weight = tl.load(weights, mask=inside, other=0.0)  # in flight while the kernel before ends
    if GATE:
        up_weight = tl.load(weights + second_half, mask=inside, other=0.0)
    wait_for_previous(PDL)
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


@triton.jit(do_not_specialize=["num_rows"])  # which no address along a row of memory depends on
def _tile(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_outputs, size, part, x_stride, weight_stride,
    GATE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
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
    wait_for_previous(PDL)
    xs = x_ptr + token.to(tl.int64)[:, None] * x_stride + first + column[None, :]
    weights = weight_row[None, :] + column[:, None]
    sums, up_sums = product(
        xs, token < num_rows, weights, second_half, size - first, part, M, ROWS, COLUMNS, GATE, EVEN
    )  # fmt: skip
    stored = (token < num_rows)[:, None] & (row < num_outputs)[None, :]
    result = finished(sums, up_sums, bias_ptr, row[None, :], num_outputs, y_ptr.dtype.element_ty, GATE, BIAS)
    place = (split.to(tl.int64) * num_rows + token[:, None]) * num_outputs + row[None, :]
    tl.store(y_ptr + place, result, mask=stored)
