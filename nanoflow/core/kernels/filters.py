"""Filters over a large vocabulary without a sort: the lowest logit that a row keeps.

top_k and top_p come down to one question: from which logit on do a row's candidates weigh a limit? The weight is 1 for
each candidate and the limit k, or the weight is the probability and the limit p of the whole. The answer is found bit
by bit, from the highest on, in the order-preserving integer keys of logits.

One program reads its row once and keeps the best few candidates of each of its lanes in registers, thousands in all.
Nearly always the answer is among them, which shows: it is not below any candidate that was dropped. Where it is not (a
very flat distribution, a huge k) each bit takes a pass over the row. All limits stay on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.temperature import LOWEST_TEMPERATURE, scaled


def thresholds(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The lowest logit that each row keeps, float32 [S]; -inf where it keeps all. Arguments as in `Filters`."""
    num_rows, size = logits_SV.shape
    threshold_S = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    if num_rows > 0:
        _thresholds[(num_rows,)](
            logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, threshold_S, size, logits_SV.stride(0),
            BITS=logits_SV.element_size() * 8, LANES=max(256, min(4096, triton.next_power_of_2(size) // 8)),
            num_warps=16,
        )  # fmt: skip
    return threshold_S


@triton.jit
def _thresholds(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr, size, stride,
    BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    by_top_k, by_top_p = top_k < size, top_p < 1
    threshold = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & (by_top_k | by_top_p | (min_p > 0)):
        nothing = tl.full((LANES,), float("-inf"), tl.float32)
        first, second, third, fourth, dropped = nothing, nothing, nothing, nothing, nothing
        for start in tl.range(0, size, LANES, loop_unroll_factor=4):
            logits = _load(logits_ptr, start, size, LANES).to(tl.float32)
            first, logits = tl.maximum(first, logits), tl.minimum(first, logits)
            second, logits = tl.maximum(second, logits), tl.minimum(second, logits)
            third, logits = tl.maximum(third, logits), tl.minimum(third, logits)
            fourth, logits = tl.maximum(fourth, logits), tl.minimum(fourth, logits)
            dropped = tl.maximum(dropped, logits)
        peak = tl.max(first, 0)
        if by_top_k | by_top_p:
            limit = top_k.to(tl.float32)
            kept = tl.join(tl.join(first, second), tl.join(third, fourth)).to(logits_ptr.dtype.element_ty)
            keys, weights = _ordered(kept, BITS), _weight(kept, peak, temperature)
            highest_dropped = _ordered(tl.max(dropped, 0).to(logits_ptr.dtype.element_ty), BITS)
            key = tl.zeros((), tl.uint32)
            if by_top_k:
                key = _reach(keys, tl.full(keys.shape, 1.0, tl.float32), limit, BITS)
            known = (key >= highest_dropped) | (by_top_k == 0)
            if known & by_top_p:
                if by_top_k:
                    weights = tl.where(keys >= key, weights, 0.0)
                    whole = tl.sum(weights)
                else:
                    whole = _weigh_row(logits_ptr, size, key, peak, temperature, True, BITS, LANES)
                key = _reach(keys, weights, top_p * whole, BITS)
                known = key >= highest_dropped
            if known == 0:
                key = tl.zeros((), tl.uint32)
                if by_top_k:
                    key = _reach_in_row(logits_ptr, size, key, limit, peak, temperature, False, BITS, LANES)
                if by_top_p:
                    limit = top_p * _weigh_row(logits_ptr, size, key, peak, temperature, True, BITS, LANES)
                    key = _reach_in_row(logits_ptr, size, key, limit, peak, temperature, True, BITS, LANES)
            if key > 0:
                threshold = _unordered(key, logits_ptr.dtype.element_ty, BITS)
        if min_p > 0:
            threshold = tl.maximum(threshold, peak + tl.log(min_p) * tl.maximum(temperature, LOWEST_TEMPERATURE))
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _reach(keys, weights, limit, BITS: tl.constexpr):
    """The highest key from which on the candidates weigh at least the limit; 0 if all of them weigh less."""
    found = tl.zeros((), tl.uint32)
    for digit in range(BITS):
        trial = found | (tl.full((), 1, tl.uint32) << (BITS - 1 - digit))
        found = tl.where(tl.sum(tl.where(keys >= trial, weights, 0.0)) >= limit, trial, found)
    return found


@triton.jit
def _reach_in_row(
    logits_ptr, size, floor, limit, peak, temperature, MASS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr
):
    """As `_reach`, among a whole row's candidates with keys from `floor` on."""
    found = tl.zeros((), tl.uint32)
    for digit in range(BITS):
        trial = found | (tl.full((), 1, tl.uint32) << (BITS - 1 - digit))
        least = tl.maximum(trial, floor)
        weight = _weigh_row(logits_ptr, size, least, peak, temperature, MASS, BITS, LANES)
        found = tl.where(weight >= limit, trial, found)
    return found


@triton.jit
def _weigh_row(logits_ptr, size, least, peak, temperature, MASS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """What a row's candidates with keys from `least` on weigh, by probability or by number."""
    sums = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, size, LANES, loop_unroll_factor=4):
        logits = _load(logits_ptr, start, size, LANES)
        weights = _weight(logits, peak, temperature) if MASS else 1.0
        sums += tl.where((_ordered(logits, BITS) >= least) & (start + tl.arange(0, LANES) < size), weights, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _load(logits_ptr, start, size, LANES: tl.constexpr):
    candidate = start + tl.arange(0, LANES)
    return tl.load(logits_ptr + candidate, mask=candidate < size, other=float("-inf"))


@triton.jit
def _weight(logits, peak, temperature):
    """Probability relative to the likeliest, so at most 1."""
    return tl.exp(scaled(logits.to(tl.float32) - peak, temperature))


@triton.jit
def _ordered(x, BITS: tl.constexpr):
    """Integers in the order of floats of 16 or 32 bits."""
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        key = (tl.where(bits < 0, ~bits, bits | 0x8000) & 0xFFFF).to(tl.uint32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def _unordered(key, dtype: tl.constexpr, BITS: tl.constexpr):
    """The float that a key stands for, as float32."""
    if BITS == 16:
        bits = tl.where(key >= 0x8000, key ^ 0x8000, key ^ 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.int32, bitcast=True)
    return bits.to(dtype, bitcast=True).to(tl.float32)
