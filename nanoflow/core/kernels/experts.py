"""A mixture of experts in four kernels: routing, sorting, and two grouped GEMMs.

Each token makes C assignments, one to each of its chosen experts. They are sorted by expert, and cut into tiles of rows
that go to one expert; a program of a grouped GEMM finds out from the experts' counts which tile is its own. The host
knows only how many tiles there may be at most, so a captured step routes as a replay's tokens want it. As vLLM's and
SGLang's fused MoE kernels do, but without padding between experts and without atomic order: the same tokens give the
same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.gemm.silu_mul import gated
from nanoflow.core.kernels.gemm.tiling import gemm
from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options

SORTED_AT_A_TIME = 4096  # assignments


@dataclass(frozen=True)
class GroupedConfig:
    """How to run a grouped GEMM: `rows` of one expert by `outputs` a program, `columns` of both at a time."""

    rows: int
    outputs: int
    columns: int
    num_warps: int
    num_stages: int


def grouped_config(num_assignments: int, num_experts: int, dtype: torch.dtype) -> GroupedConfig:
    """Settings by how many rows an expert has on average: few read weights, many compute. Chosen, not yet searched."""
    if dtype == torch.float32:
        return GroupedConfig(rows=16, outputs=32, columns=32, num_warps=4, num_stages=2)
    if num_assignments <= 16 * num_experts:
        return GroupedConfig(rows=16, outputs=32, columns=128, num_warps=4, num_stages=4)
    if num_assignments <= 64 * num_experts:
        return GroupedConfig(rows=64, outputs=64, columns=64, num_warps=4, num_stages=4)
    return GroupedConfig(rows=128, outputs=64, columns=64, num_warps=8, num_stages=3)


def mix_experts(
    x_TD: torch.Tensor, logits_TX: torch.Tensor, gate_up_X2FD: torch.Tensor, down_XDF: torch.Tensor, num_chosen: int,
    *, renormalize: bool, config: GroupedConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """The chosen experts' weighted results [C, T, D], which add up to `core.ops.experts.mix_experts`.

    Args:
        x_TD: any row stride.
        logits_TX: the router's.
        gate_up_X2FD, down_XDF: contiguous.
        num_chosen: C.
        renormalize: whether a token's weights are scaled to sum up to 1.
        config: of both GEMMs; by default what suits the sizes.
    """
    num_tokens, size = x_TD.shape
    num_experts, _, inner, _ = gate_up_X2FD.shape
    num_assignments = num_tokens * num_chosen
    out_CTD = torch.empty((num_chosen, num_tokens, size), dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens == 0:
        return out_CTD
    weights_TC, chosen_TC, counts_X = route(logits_TX, num_chosen, renormalize=renormalize)
    order_A = sort(chosen_TC, counts_X)
    s = config or grouped_config(num_assignments, num_experts, x_TD.dtype)
    num_tiles = min(num_assignments, num_experts) + num_assignments // s.rows
    options = {
        "C": num_chosen, "BLOCK_X": experts_block(num_experts), "ROWS": s.rows, "OUTPUTS": s.outputs,
        "COLUMNS": s.columns, "num_warps": s.num_warps, "num_stages": s.num_stages, **pdl_options(x_TD),
    }  # fmt: skip
    gated_AF = torch.empty((num_assignments, inner), dtype=x_TD.dtype, device=x_TD.device)
    _gate_up[(triton.cdiv(inner, s.outputs), num_tiles)](
        x_TD, gate_up_X2FD, order_A, counts_X, gated_AF, num_experts, inner, size, x_TD.stride(0),
        EVEN=size % s.columns == 0, **options,
    )  # fmt: skip
    _down[(triton.cdiv(size, s.outputs), num_tiles)](
        gated_AF, down_XDF, order_A, counts_X, weights_TC, out_CTD, num_experts, size, inner, num_tokens,
        EVEN=inner % s.columns == 0, **options,
    )  # fmt: skip
    return out_CTD


def route(
    logits_TX: torch.Tensor, num_chosen: int, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `core.ops.experts.route`, and how many assignments each expert got [X], int32."""
    num_tokens, num_experts = logits_TX.shape
    device = logits_TX.device
    weights_TC = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=device)
    chosen_TC = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=device)
    counts_X = torch.zeros(num_experts, dtype=torch.int32, device=device)
    _route[(num_tokens,)](
        logits_TX, weights_TC, chosen_TC, counts_X, num_experts, logits_TX.stride(0), C=num_chosen,
        BLOCK_C=triton.next_power_of_2(num_chosen), BLOCK_X=experts_block(num_experts),
        RENORMALIZE=renormalize, num_warps=1, **pdl_options(logits_TX),
    )  # fmt: skip
    return weights_TC, chosen_TC, counts_X


def sort(chosen_TC: torch.Tensor, counts_X: torch.Tensor) -> torch.Tensor:
    """Assignments [A], int32, by expert and then by number; assignment a is token a // C's choice a % C."""
    num_assignments, num_experts = chosen_TC.numel(), len(counts_X)
    order_A = torch.empty(num_assignments, dtype=torch.int32, device=chosen_TC.device)
    _sort[(num_experts,)](
        chosen_TC, counts_X, order_A, num_assignments, BLOCK_X=experts_block(num_experts),
        BLOCK=max(32, min(SORTED_AT_A_TIME, triton.next_power_of_2(num_assignments))), num_warps=4,
        **pdl_options(order_A),
    )  # fmt: skip
    return order_A


def experts_block(num_experts: int) -> int:
    """Experts in a program's vectors: a power of two, and enough for the lanes of a warp."""
    return max(32, triton.next_power_of_2(num_experts))


@triton.jit
def _route(
    logits_ptr, weights_ptr, chosen_ptr, counts_ptr, num_experts, stride, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_X)
    choices = tl.arange(0, BLOCK_C)
    pdl_launch_then_wait(PDL)
    logits = tl.load(logits_ptr + token * stride + experts, mask=experts < num_experts, other=-float("inf"))
    logits = logits.to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, 0))
    left = tl.where(experts < num_experts, powers / tl.sum(powers, 0), -1.0)
    weights = tl.zeros([BLOCK_C], tl.float32)
    chosen = tl.zeros([BLOCK_C], tl.int32)
    for choice in tl.static_range(C):
        best = tl.minimum(tl.argmax(left, 0), num_experts - 1)  # NaNs are no reason to write elsewhere
        weights = tl.where(choices == choice, tl.max(left, 0), weights)
        chosen = tl.where(choices == choice, best, chosen)
        left = tl.where(experts == best, -1.0, left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 0)
    tl.store(weights_ptr + token * C + choices, weights, mask=choices < C)
    tl.store(chosen_ptr + token * C + choices, chosen, mask=choices < C)
    tl.atomic_add(counts_ptr + chosen, 1, mask=choices < C)


@triton.jit(do_not_specialize=["num_assignments"])
def _sort(
    chosen_ptr, counts_ptr, order_ptr, num_assignments, BLOCK_X: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program an expert: it looks through all assignments for its own, and writes them behind those before it."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_X)
    pdl_launch_then_wait(PDL)
    place = tl.sum(tl.load(counts_ptr + experts, mask=experts < expert, other=0), 0)
    for start in range(0, num_assignments, BLOCK):
        assignments = start + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + assignments, mask=assignments < num_assignments, other=-1)
        own = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(own, 0) - 1, assignments, mask=own > 0)
        place += tl.sum(own, 0)


@triton.jit
def find_tile(counts_ptr, tile, num_experts, BLOCK_X: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile, its first row in the sorted order, and the end of that expert's rows.

    Of tiles that there is no use for the expert is `BLOCK_X`.
    """
    experts = tl.arange(0, BLOCK_X)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    tiles = tl.cdiv(counts, ROWS)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    start = tl.sum(tl.where(experts < expert, counts, 0), 0)
    stop = tl.sum(tl.where(experts <= expert, counts, 0), 0)
    return expert, start + (tile - first_tile) * ROWS, stop


@triton.jit
def _gate_up(
    x_ptr, weight_ptr, order_ptr, counts_ptr, out_ptr, num_experts, inner, size, x_stride,
    C: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(x gateᵀ) * (x upᵀ) of one tile's rows, written in sorted order."""
    pdl_launch_then_wait(PDL)
    expert, first, stop = find_tile(counts_ptr, tl.program_id(1), num_experts, BLOCK_X, ROWS)
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, ROWS)
    tokens = tl.load(order_ptr + rows, mask=rows < stop, other=0) // C
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.arange(0, COLUMNS)
    xs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + columns[None, :]
    # Outputs past the end read the last one; their results are not stored.
    weight_rows = expert.to(tl.int64) * 2 * inner + tl.minimum(outputs, inner - 1)
    gates = weight_ptr + weight_rows[None, :] * size + columns[:, None]
    to_up = inner.to(tl.int64) * size
    gate, up = gemm(xs, rows < stop, gates, to_up, size, size, ROWS, OUTPUTS, COLUMNS, True, EVEN)
    dtype = out_ptr.dtype.element_ty
    place = rows.to(tl.int64)[:, None] * inner + outputs[None, :]
    stored = (rows < stop)[:, None] & (outputs < inner)[None, :]
    tl.store(out_ptr + place, gated(gate.to(dtype), up.to(dtype)), mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def _down(
    x_ptr, weight_ptr, order_ptr, counts_ptr, weights_ptr, out_ptr, num_experts, num_outputs, size, num_tokens,
    C: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x downᵀ of one tile's rows, times their weights, written to where choice and token say."""
    pdl_launch_then_wait(PDL)
    expert, first, stop = find_tile(counts_ptr, tl.program_id(1), num_experts, BLOCK_X, ROWS)
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, ROWS)
    assignments = tl.load(order_ptr + rows, mask=rows < stop, other=0)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.arange(0, COLUMNS)
    xs = x_ptr + rows.to(tl.int64)[:, None] * size + columns[None, :]
    weight_rows = expert.to(tl.int64) * num_outputs + tl.minimum(outputs, num_outputs - 1)
    ws = weight_ptr + weight_rows[None, :] * size + columns[:, None]
    sums, _ = gemm(xs, rows < stop, ws, 0, size, size, ROWS, OUTPUTS, COLUMNS, False, EVEN)
    sums *= tl.load(weights_ptr + assignments, mask=rows < stop, other=0.0)[:, None]
    place = ((assignments % C).to(tl.int64) * num_tokens + assignments // C)[:, None] * num_outputs + outputs[None, :]
    stored = (rows < stop)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=stored)
