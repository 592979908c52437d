"""Sampling over a large vocabulary: filters without a sort, and a draw in one pass over the logits.

A row is cut into C chunks, one program each, so that a single row keeps the whole GPU busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from nanoflow.core.data.parallel import SINGLE_RANK, ParallelContext
from nanoflow.core.kernels.filters import thresholds
from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options
from nanoflow.core.kernels.temperature import scaled
from nanoflow.core.ops.filters import Filters


def sample(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    filters: Filters | None = None, last_token_R: torch.Tensor | None = None, targets_S: torch.Tensor | None = None,
    outbox: torch.Tensor | None = None, turn_1: torch.Tensor | None = None, parallel: ParallelContext = SINGLE_RANK,
) -> torch.Tensor:  # fmt: skip
    """As `core.ops.sampling.sample`."""
    lowest_S = None
    if filters is not None:
        lowest_S = thresholds(logits_SV, temperature_S, filters.top_k_S, filters.top_p_S, filters.min_p_S)
    return draw(
        logits_SV, temperature_S, seed_S, position_S, lowest_S, last_token_R, targets_S, outbox, turn_1, parallel
    )  # fmt: skip


def draw(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    threshold_S: torch.Tensor | None = None, last_token_R: torch.Tensor | None = None,
    targets_S: torch.Tensor | None = None, outbox: torch.Tensor | None = None, turn_1: torch.Tensor | None = None,
    parallel: ParallelContext = SINGLE_RANK,
) -> torch.Tensor:  # fmt: skip
    """Token ids [S], int64: argmax of the logits where the temperature is 0, else of logits / temperature + noise; -1
    where a logit is NaN or the best is infinite.

    With `threshold_S` (float32), only candidates with logits of at least that take part in a draw. With `last_token_R`
    (int64), the tokens are also written there, at `targets_S` (int64); with `outbox` (int64, pinned, [slots, S or
    more]), into the slot before that of `turn_1` (int32). `parallel` is as in `core.ops.sampling.sample`.
    """
    num_rows, size = logits_SV.shape
    chunk = _chunk_size(num_rows, size)
    # The best score of each chunk, as the bits of a float32, and whose it is: one tensor for one exchange.
    best_2SC = torch.empty((2, num_rows, triton.cdiv(size, chunk)), dtype=torch.int32, device=logits_SV.device)
    token_ids_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    if num_rows == 0:
        return token_ids_S
    _best_of_chunk[best_2SC.shape[1:]](
        logits_SV, temperature_S, seed_S, position_S, threshold_S, best_2SC, parallel.rank * size, size,
        logits_SV.stride(0), FILTERED=threshold_S is not None, CHUNK=chunk, BLOCK=1024, FAST=logits_SV.is_cuda,
        num_warps=4, **pdl_options(logits_SV),
    )  # fmt: skip
    best_2SC = parallel.all_gather(best_2SC)
    num_chunks = best_2SC.shape[2]
    _best_of_row[(num_rows,)](
        best_2SC, token_ids_S, last_token_R, targets_S, outbox, turn_1, num_chunks,
        0 if outbox is None else outbox.stride(0), FEED=last_token_R is not None,
        SLOTS=0 if outbox is None else len(outbox), BLOCK=triton.next_power_of_2(num_chunks), num_warps=1,
        **pdl_options(logits_SV),
    )  # fmt: skip
    return token_ids_S


def _chunk_size(num_rows: int, size: int) -> int:
    """A multiple of 1024 that gives each of 132 multiprocessors several programs where it can."""
    return 1024 * max(1, min(8, num_rows * size // (1024 * 1024)))


# One number is read of the positions, wherever it lies; ranks have one program.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["position_ptr"])
def _best_of_chunk(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, threshold_ptr, best_ptr, first, size, stride,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_launch_then_wait(PDL)
    temperature = tl.load(temperature_ptr + row)
    key = _key(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    lowest = float("-inf")
    if FILTERED:
        lowest = tl.load(threshold_ptr + row)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane, so that lanes meet only once
    best_id = first + chunk * CHUNK + lanes
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), BLOCK):
        place = start + lanes
        candidate = first + place
        score = tl.load(logits_ptr + row * stride + place, mask=place < size, other=float("-inf"))
        score = score.to(tl.float32)
        score = tl.where(score == score, score, float("inf"))  # NaN wins, and is told by that
        if tl.max(score, 0) >= lowest if FILTERED else True:  # most blocks hold nothing that a filter keeps
            if temperature > 0:
                kept = score >= lowest
                score = tl.where(kept, scaled(score, temperature) + _gumbel(candidate, key, FAST), float("-inf"))
            better = score > best
            best, best_id = tl.where(better, score, best), tl.where(better, candidate, best_id)
    top = tl.max(best, 0)
    top_id = tl.min(tl.where(best == top, best_id, first + size - 1), 0)
    best_ptr += row * tl.num_programs(1) + chunk
    tl.store(best_ptr, top.to(tl.int32, bitcast=True))
    tl.store(best_ptr + tl.num_programs(0).to(tl.int64) * tl.num_programs(1), top_id)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["targets_ptr"])
def _best_of_row(
    best_ptr, token_ids_ptr, last_token_ptr, targets_ptr, outbox_ptr, turn_ptr, num_chunks, stride,
    FEED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    pdl_launch_then_wait(PDL)
    best_ptr += row * num_chunks
    inside = chunks < num_chunks
    values = tl.load(best_ptr + chunks, mask=inside, other=0).to(tl.float32, bitcast=True)
    top, place = tl.max(
        tl.where(inside, values, float("-inf")), 0, return_indices=True, return_indices_tie_break_left=True
    )
    token_id = tl.load(best_ptr + tl.num_programs(0).to(tl.int64) * num_chunks + place).to(tl.int64)
    token_id = tl.where(tl.abs(top) < float("inf"), token_id, -1)  # `NO_TOKEN`
    tl.store(token_ids_ptr + row, token_id)
    if FEED:
        tl.store(last_token_ptr + tl.load(targets_ptr + row), token_id)
    if SLOTS > 0:
        slot = (tl.load(turn_ptr) - 1) & (SLOTS - 1)
        tl.store(outbox_ptr + slot * stride + row, token_id)


@triton.jit
def _key(seed, position):
    """What `gumbel_noise` makes of a seed and a position."""
    key = _mix(seed.to(tl.uint32))
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    return _mix(key ^ position.to(tl.uint32))


@triton.jit
def _gumbel(candidate, key, FAST: tl.constexpr):
    """Noise of these candidates, as `gumbel_noise`, up to 1e-5."""
    bits = _mix(_mix(candidate.to(tl.uint32) ^ key) + key)
    rest = (8388607.5 - (bits >> 9).to(tl.float32)) * 1.1920928955078125e-07  # 1 - uniform, exact
    if FAST:
        # The GPU's own logarithm is right to 1e-7 of 1; where that is too much, the first terms of a series.
        series = rest + rest * rest * (0.5 + rest * 0.33333333)
        exponential = tl.where(rest < 0.01, series, libdevice.fast_log2f(1.0 - rest) * -0.6931471805599453)
        return libdevice.fast_log2f(exponential) * -0.6931471805599453
    return -tl.log(-tl.log(1.0 - rest))


@triton.jit
def _mix(x):
    """lowbias32, as in `core.ops.sampling`."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)
