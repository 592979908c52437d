"""Sampling over a large vocabulary: a draw in one pass over the logits, and filters without a sort.

A row is cut into C chunks, one program each, so that a single row keeps the whole GPU busy.

The filters top_k and top_p come down to one question: which is the smallest logit of the row that has less than some
weight strictly above it? The weight is 1 for each candidate and the limit k, or the weight is the probability and the
limit p. It is answered digit by digit, as in radix selection: a pass adds up the weights of 16 bins, those of the next
four bits of the order-preserving integer key of a logit, and the next pass goes on in the bin where the limit is met.
All limits stay on the device; rows that ask for no filter end each pass at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from nanoflow.core.kernels.launch import begin, overlap

BINS = 16
LOWEST_TEMPERATURE = tl.constexpr(1e-10)


def draw(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    threshold_S: torch.Tensor | None = None, last_token_R: torch.Tensor | None = None,
    targets_S: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Token ids [S], int64: argmax of the logits where the temperature is 0, else of logits / temperature + noise.

    With `threshold_S` (float32), only candidates with logits of at least that take part in a draw. With `last_token_R`
    (int64), the tokens are also written there, at `targets_S` (int64).
    """
    num_rows, size = logits_SV.shape
    chunk = _chunk_size(num_rows, size)
    num_chunks = triton.cdiv(size, chunk)
    place = {"device": logits_SV.device}
    values_SC = torch.empty((num_rows, num_chunks), dtype=torch.float32, **place)
    ids_SC = torch.empty((num_rows, num_chunks), dtype=torch.int32, **place)
    token_ids_S = torch.empty(num_rows, dtype=torch.int64, **place)
    if num_rows == 0:
        return token_ids_S
    _best_of_chunk[(num_rows, num_chunks)](
        logits_SV, temperature_S, seed_S, position_S, threshold_S, values_SC, ids_SC, size, logits_SV.stride(0),
        FILTERED=threshold_S is not None, CHUNK=chunk, BLOCK=1024, FAST=logits_SV.is_cuda, num_warps=4,
        **overlap(logits_SV),
    )  # fmt: skip
    _best_of_row[(num_rows,)](
        values_SC, ids_SC, token_ids_S, last_token_R, targets_S, num_chunks, FEED=last_token_R is not None,
        BLOCK=triton.next_power_of_2(num_chunks), num_warps=1, **overlap(logits_SV),
    )  # fmt: skip
    return token_ids_S


def thresholds(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor,
    min_p_S: torch.Tensor, *, top_k: bool = True, top_p: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The lowest logit that each row keeps, float32 [S]; -inf where it keeps all.

    `top_k` and `top_p` say whether any row can ask for that filter; without it, its passes are not run.
    """
    num_rows, size = logits_SV.shape
    bits = logits_SV.element_size() * 8
    chunk = _chunk_size(num_rows, size)
    num_chunks = triton.cdiv(size, chunk)
    place = {"device": logits_SV.device}
    peaks_SC = torch.empty((num_rows, num_chunks), dtype=torch.float32, **place)
    histograms = torch.empty((2, num_rows, num_chunks, BINS), dtype=torch.float32, **place)
    keys = torch.empty((2, num_rows, 2), dtype=torch.int64, **place)
    weights = torch.empty((2, num_rows, 2), dtype=torch.float32, **place)
    threshold_S = torch.empty(num_rows, dtype=torch.float32, **place)
    if num_rows == 0:
        return threshold_S
    limits = (temperature_S, top_k_S, top_p_S, min_p_S)
    grid = (num_rows, num_chunks)
    _peaks[grid](logits_SV, peaks_SC, size, logits_SV.stride(0), CHUNK=chunk, BLOCK=1024)
    new = 0
    for mass in [False] * top_k + [True] * top_p:
        for shift in range(bits - 4, -1, -4):
            old, new = new, 1 - new
            _histogram[grid](
                logits_SV, *limits, peaks_SC, histograms[old], histograms[new], keys[old], keys[new], weights[old],
                weights[new], size, logits_SV.stride(0), num_chunks, shift, MASS=mass, FIRST=shift == bits - 4,
                SECOND=shift == bits - 8, TOP_K=top_k, BITS=bits, CHUNKS=triton.next_power_of_2(num_chunks),
                CHUNK=chunk, BLOCK=256,
            )  # fmt: skip
    _finish[(num_rows,)](
        logits_SV, *limits, peaks_SC, histograms[new], keys[new], weights[new], threshold_S, size, num_chunks,
        TOP_K=top_k, TOP_P=top_p, BITS=bits, CHUNKS=triton.next_power_of_2(num_chunks),
    )  # fmt: skip
    return threshold_S


def _chunk_size(num_rows: int, size: int) -> int:
    """A multiple of 1024 that gives each of 132 multiprocessors several programs where it can."""
    return 1024 * max(1, min(8, num_rows * size // (1024 * 1024)))


@triton.jit
def _best_of_chunk(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, threshold_ptr, values_ptr, ids_ptr, size, stride,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin(PDL)
    temperature = tl.load(temperature_ptr + row)
    key = _key(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    lowest = float("-inf")
    if FILTERED:
        lowest = tl.load(threshold_ptr + row)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane, so that lanes meet only once
    best_id = chunk * CHUNK + lanes
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), BLOCK):
        candidate = start + lanes
        score = tl.load(logits_ptr + row * stride + candidate, mask=candidate < size, other=float("-inf"))
        score = score.to(tl.float32)
        if temperature > 0:
            kept = score >= lowest
            score = tl.where(kept, _score(score, temperature) + _gumbel(candidate, key, FAST), float("-inf"))
        better = score > best
        best, best_id = tl.where(better, score, best), tl.where(better, candidate, best_id)
    top = tl.max(best, 0)
    tl.store(values_ptr + row * tl.num_programs(1) + chunk, top)
    tl.store(ids_ptr + row * tl.num_programs(1) + chunk, tl.min(tl.where(best == top, best_id, size - 1), 0))


@triton.jit
def _best_of_row(
    values_ptr, ids_ptr, token_ids_ptr, last_token_ptr, targets_ptr, num_chunks, FEED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    begin(PDL)
    values = tl.load(values_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    place = tl.argmax(values, 0, tie_break_left=True)
    token_id = tl.load(ids_ptr + row * num_chunks + place).to(tl.int64)
    tl.store(token_ids_ptr + row, token_id)
    if FEED:
        tl.store(last_token_ptr + tl.load(targets_ptr + row), token_id)


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
    """lowbias32, as in `core.sampler`."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


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
    """The float that an int64 key stands for, as float32."""
    if BITS == 16:
        bits = tl.where(key >= 0x8000, key ^ 0x8000, ~key).to(tl.int16)
    else:
        bits = tl.where(key >= 0x80000000, key ^ 0x80000000, ~key).to(tl.int32)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _score(logits, temperature):
    """logits / temperature, up to the last bit, for a tenth of the work."""
    return logits.to(tl.float32) * (1.0 / tl.maximum(temperature, LOWEST_TEMPERATURE))


@triton.jit
def _peaks(logits_ptr, peaks_ptr, size, stride, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit of each chunk."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = float("-inf")
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + candidate, mask=candidate < size, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(logits.to(tl.float32), 0))
    tl.store(peaks_ptr + row * tl.num_programs(1) + chunk, peak)


@triton.jit
def _peak(peaks_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """Highest logit of the row."""
    chunks = tl.arange(0, CHUNKS)
    peaks = tl.load(peaks_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    return tl.max(peaks, 0)


@triton.jit
def _descend(
    histograms_ptr, key, above, whole, limit, row, num_chunks, FIRST: tl.constexpr, MASS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Go on from `key`, which has `above` over it, into the lowest bin that has less than the limit over it.

    Returns the key with that bin's digit, the weight above the bin, and the whole row's weight.
    """
    bins = tl.arange(0, 16)
    chunks = tl.arange(0, CHUNKS)
    entries = row * num_chunks * 16 + chunks[:, None] * 16 + bins[None, :]
    histogram = tl.sum(tl.load(histograms_ptr + entries, mask=(chunks < num_chunks)[:, None], other=0.0), 0)
    if FIRST:
        whole = tl.sum(histogram, 0)
    if MASS:
        limit *= whole
    over = above + tl.sum(tl.where(bins[None, :] > bins[:, None], histogram[None, :], 0.0), 1)
    highest = tl.max(tl.where(histogram > 0, bins, 0), 0)
    digit = tl.minimum(tl.min(tl.where((histogram > 0) & (over < limit), bins, 16), 0), highest)
    return key * 16 + digit, tl.sum(tl.where(bins == digit, over, 0.0), 0), whole


@triton.jit
def _histogram(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, peaks_ptr, old_histograms_ptr, histograms_ptr,
    old_keys_ptr, keys_ptr, old_weights_ptr, weights_ptr, size, stride, num_chunks, shift,
    MASS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, TOP_K: tl.constexpr, BITS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Evaluate the previous pass, then add up the weights of this pass's 16 bins.

    State of a row: keys = (digits so far, the lowest key that top_k keeps), weights = (what is above, the whole).
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (temperature > 0) & ((top_p < 1) if MASS else (top_k < size)):
        key, floor = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
        above, whole = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        if not FIRST:
            key, floor = tl.load(old_keys_ptr + row * 2), tl.load(old_keys_ptr + row * 2 + 1)
            above, whole = tl.load(old_weights_ptr + row * 2), tl.load(old_weights_ptr + row * 2 + 1)
            limit = top_p if MASS else top_k.to(tl.float32)
            key, above, whole = _descend(
                old_histograms_ptr, key, above, whole, limit, row, num_chunks, SECOND, MASS, CHUNKS
            )
        elif MASS and TOP_K:
            last, _, _ = _descend(
                old_histograms_ptr, tl.load(old_keys_ptr + row * 2), tl.load(old_weights_ptr + row * 2), whole,
                top_k.to(tl.float32), row, num_chunks, False, False, CHUNKS,
            )  # fmt: skip
            floor = tl.where(top_k < size, last, 0)
        if chunk == 0:
            tl.store(keys_ptr + row * 2, key)
            tl.store(keys_ptr + row * 2 + 1, floor)
            tl.store(weights_ptr + row * 2, above)
            tl.store(weights_ptr + row * 2 + 1, whole)

        if MASS:
            peak = _score(_peak(peaks_ptr, row, num_chunks, CHUNKS), temperature)
        bins = tl.arange(0, 16)
        sums = tl.zeros((16, BLOCK), tl.float32)
        for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, size), BLOCK):
            candidate = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * stride + candidate, mask=candidate < size, other=float("-inf"))
            ordered = _ordered(logits, BITS)
            counts = candidate < size
            if not FIRST:
                counts = counts & ((ordered >> (shift + 4)) == key.to(tl.uint32))
            if MASS:
                counts = counts & (ordered >= floor.to(tl.uint32))
                weight = tl.exp(_score(logits, temperature) - peak)  # at most 1
            else:
                weight = tl.full((BLOCK,), 1.0, tl.float32)
            digit = ((ordered >> shift) & 15).to(tl.int32)
            digit = tl.where(counts, digit, 16)
            sums += tl.where(digit[None, :] == bins[:, None], weight[None, :], 0.0)
        tl.store(histograms_ptr + (row * num_chunks + chunk) * 16 + bins, tl.sum(sums, 1))


@triton.jit
def _finish(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, peaks_ptr, histograms_ptr, keys_ptr, weights_ptr,
    threshold_ptr, size, num_chunks, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Evaluate the row's last pass, and take min_p in.

    Rows with top_k alone sat out the passes of top_p, an even number, so their state is in the same half as others'.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    threshold = tl.full((), float("-inf"), tl.float32)
    if temperature > 0:
        key, above = tl.load(keys_ptr + row * 2), tl.load(weights_ptr + row * 2)
        whole = tl.load(weights_ptr + row * 2 + 1)
        by_top_p, by_top_k = TOP_P & (top_p < 1), TOP_K & (top_k < size)
        if by_top_p:
            key, _, _ = _descend(histograms_ptr, key, above, whole, top_p, row, num_chunks, False, True, CHUNKS)
        elif by_top_k:
            limit = top_k.to(tl.float32)
            key, _, _ = _descend(histograms_ptr, key, above, whole, limit, row, num_chunks, False, False, CHUNKS)
        if by_top_p | by_top_k:
            threshold = _unordered(key, dtype, BITS)
        if min_p > 0:
            peak = _peak(peaks_ptr, row, num_chunks, CHUNKS)
            threshold = tl.maximum(threshold, peak + tl.log(min_p) * tl.maximum(temperature, LOWEST_TEMPERATURE))
    tl.store(threshold_ptr + row, threshold)
