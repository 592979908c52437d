"""What Triton's GEMMs have in common: how they are cut, the loop over columns, what becomes of the sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.settings import TileConfig
from nanoflow.core.kernels.gemm.silu_mul import gated
from nanoflow.core.kernels.memory import empty_rows


def cut(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, config: TileConfig, *, gate: bool
) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """Where x Wᵀ + b is left, how many columns of x a program goes through, and the programs by what they differ in.

    The result is [M, N] of x's dtype, or [M, N / 2] with `gate`. Programs that share the columns of a row leave as many
    partials [C, M, N] in float32; that goes with neither gate nor bias.
    """
    num_rows, size = x_MK.shape
    num_outputs = weight_NK.shape[0] // 2 if gate else weight_NK.shape[0]
    part = triton.cdiv(triton.cdiv(size, config.splits), config.columns) * config.columns
    splits = triton.cdiv(size, part)
    if splits == 1:
        y = empty_rows(num_rows, num_outputs, dtype=x_MK.dtype, device=x_MK.device)
    else:
        assert not gate
        assert bias_N is None
        y = torch.empty((splits, num_rows, num_outputs), dtype=torch.float32, device=x_MK.device)
    return y, part, (triton.cdiv(num_rows, config.tokens), triton.cdiv(num_outputs, config.rows), splits)


@triton.jit
def gemm(
    xs, there, weights, to_up, num_columns, part,
    M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, GATE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x Wᵀ [M, N] in float32, with the weights that are given; and with those `to_up` further on, if there is a `GATE`.

    Args:
        xs: pointers [M, `COLUMNS`] to where rows of x begin; those that are not `there` [M] count as 0.
        weights: pointers [`COLUMNS`, N] to where rows of W begin; all of them are read.
        num_columns: how many there are; what lies beyond counts as 0.
        part: how many to go through.
        EVEN: says that so many there are, in whole steps.
    """
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros((M, N), tl.float32)
    up_sums = tl.zeros((M, N), tl.float32)
    for start in range(0, part, COLUMNS):
        if EVEN:
            x = tl.load(xs + start, mask=there[:, None], other=0.0)
            weight = tl.load(weights + start)
        else:
            inside = start + columns < num_columns
            x = tl.load(xs + start, mask=there[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weights + start, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if GATE:
            if EVEN:
                up_weight = tl.load(weights + to_up + start)
            else:
                up_weight = tl.load(weights + to_up + start, mask=inside[:, None], other=0.0)
            up_sums = tl.dot(x, up_weight, up_sums, input_precision="ieee")
    return sums, up_sums


@triton.jit
def finished(
    sums, up_sums, bias_ptr, row, num_outputs, dtype: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """The sums + b, rounded to `dtype`; with a `GATE`, silu of that times the same of `up_sums`.

    Args:
        sums, up_sums: float32.
        bias_ptr: b, with that of `up_sums` behind it.
        row: of W, whose sums these are; of a shape that can be broadcast to theirs.
        num_outputs: how many there are; others get no bias.
    """
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=row < num_outputs, other=0.0).to(tl.float32)
        if GATE:
            up_sums += tl.load(bias_ptr + num_outputs + row, mask=row < num_outputs, other=0.0).to(tl.float32)
    result = sums.to(dtype)
    if GATE:
        result = gated(result, up_sums.to(dtype))
    return result
