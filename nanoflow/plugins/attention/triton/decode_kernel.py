"""Decode attention over a paged cache: one query token a sequence, memory-bound, balanced over tokens.

The query heads of a KV head share one tile, so that keys and values are read once (FlashDecoding with packed GQA; Dao,
Haziza, Massa and Sizov, 2023). The work is cut in the manner of Stream-K (Osama et al., 2023): the tiles of all
sequences stand in one row, and each program takes an equal, contiguous share of it, whatever the sequences' lengths.
A sequence that lies in several shares leaves a partial result in each; the program that is last to finish its part
combines them, so there is no second kernel, and the order of the sum is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanoflow.core.kernels.pdl import pdl_launch, pdl_wait, prefetch
from nanoflow.plugins.attention.triton.tiles import HIDDEN, block_ids, tiles_before_window


@triton.jit(do_not_specialize=["num_seqs", "num_shares"])
def share_kernel(
    query_start_ptr, context_lens_ptr, ends_ptr, shares_ptr, num_seqs, num_shares,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, LEAST: tl.constexpr, SKIP: tl.constexpr,
    WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Cut the row of tiles into equal shares.

    Writes `ends` [S + 1], the place in the row after each sequence's last tile, and the size of a share; and `shares`
    [W, 4]: the sequence in which a share begins, the places of its first tile and after its last one, and the length
    of its context without the last `SKIP` tokens. Every decoding sequence has at least one tile, so that its output is
    written, and the others, which come after them, have none. Tiles before the window count for nothing.

    With `LEAST` a share has at least that many tiles, and never those of two sequences.
    """
    seqs = tl.arange(0, BLOCK_S)
    valid = seqs < num_seqs
    pdl_wait(PDL)
    starts = tl.load(query_start_ptr + seqs, mask=valid, other=-1)
    next_starts = tl.load(query_start_ptr + seqs + 1, mask=valid, other=-1)
    valid = (starts == seqs) & (next_starts == seqs + 1)
    lens = tl.load(context_lens_ptr + seqs, mask=valid, other=SKIP) - SKIP
    before = tiles_before_window(lens + SKIP, WINDOW, BLOCK_N)
    tiles = tl.where(valid, tl.maximum(tl.cdiv(lens, BLOCK_N) - before, 1), 0)
    if LEAST > 0:
        share = tl.maximum(tl.cdiv(tl.sum(tiles, 0), num_shares - num_seqs), LEAST)
        tiles = tl.cdiv(tiles, share) * share
    else:
        share = tl.maximum(tl.cdiv(tl.sum(tiles, 0), num_shares), 1)
    ends = tl.cumsum(tiles, 0)
    shares = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    before = (ends[None, :] <= (shares * share)[:, None]) & (seqs < num_seqs)[None, :]
    first = tl.sum(before.to(tl.int32), 1)
    is_first = seqs[None, :] == first[:, None]
    there = shares < num_shares
    tl.store(shares_ptr + shares * 4, first, mask=there)
    tl.store(shares_ptr + shares * 4 + 1, tl.max(tl.where(before, ends[None, :], 0), 1), mask=there)
    tl.store(shares_ptr + shares * 4 + 2, tl.sum(tl.where(is_first, ends[None, :], 0), 1), mask=there)
    tl.store(shares_ptr + shares * 4 + 3, tl.sum(tl.where(is_first, lens[None, :], 0), 1), mask=there)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + seqs, ends, mask=seqs < num_seqs)
        tl.store(ends_ptr + num_seqs, share)


@triton.jit
def with_partner(ptr, mask, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Heads, or what their dims have, at the pointers `ptr` [R, 1]; and the same for the dims they rotate with."""
    dims = tl.arange(0, BLOCK_H)[None, :]
    mask = mask & (dims < H)
    return tl.load(ptr + dims, mask=mask, other=0.0), tl.load(ptr + (dims + H // 2) % H, mask=mask, other=0.0)


@triton.jit
def norm_weight(ptr, H: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr):
    """The weight of a norm over heads [1, H], and of the dims they rotate with; 0 for none."""
    one = tl.arange(0, 1)[:, None]
    if NORM:
        weight, partner = with_partner(ptr + one, one == 0, H, BLOCK_H)
    else:
        weight, partner = 0.0, 0.0
    return weight, partner


@triton.jit
def rotation(cos_ptr, sin_ptr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Cosines and sines [1, H] of one position."""
    dims = tl.arange(0, BLOCK_H)[None, :]
    return tl.load(cos_ptr + dims, mask=dims < H, other=0.0), tl.load(sin_ptr + dims, mask=dims < H, other=0.0)


@triton.jit
def normed_and_rotated(raw, partner, weight, partner_weight, cos, sin, eps, H: tl.constexpr, NORM: tl.constexpr):
    """Heads [R, H], normed and rotated, and rounded after each, as `core.ops.attention` does."""
    x, y = raw.to(tl.float32), partner.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        x = (x * factor * weight.to(tl.float32)).to(raw.dtype).to(tl.float32)
        y = (y * factor * partner_weight.to(tl.float32)).to(raw.dtype).to(tl.float32)
    return (x * cos + y * sin).to(raw.dtype)


@triton.jit
def prefetch_context(
    key_ptr, value_ptr, table_ptr, first, length, stride_kb, stride_kp, stride_vb, stride_vp,
    H: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Bring keys and values of `TOKENS` tokens from `first` on into the L2 cache."""
    LINES: tl.constexpr = (H * key_ptr.dtype.element_ty.primitive_bitwidth // 8 + 127) // 128
    tokens = tl.minimum(first + tl.arange(0, TOKENS), tl.maximum(length - 1, 0))
    blocks = tl.load(table_ptr + tokens // P).to(tl.int64)
    for line in tl.static_range(LINES):
        prefetch(key_ptr + blocks * stride_kb + tokens % P * stride_kp + line * (H // LINES))
        prefetch(value_ptr + blocks * stride_vb + tokens % P * stride_vp + line * (H // LINES))


@triton.jit
def load_tile(
    key_ptr, value_ptr, blocks, token, length, stride_kb, stride_kp, stride_vb, stride_vp,
    H: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys [H, N] and values [N, H] of the tile of tokens from `token` on, and which of them are there to be seen."""
    dims = tl.arange(0, BLOCK_H)
    tokens = token + tl.arange(0, BLOCK_N)
    seen = tokens < length
    if WINDOW > 0:
        seen = seen & (tokens >= length + SKIP - WINDOW)
    offset_k = blocks.to(tl.int64) * stride_kb + tokens % P * stride_kp
    offset_v = blocks.to(tl.int64) * stride_vb + tokens % P * stride_vp
    k = tl.load(key_ptr + offset_k[None, :] + dims[:, None], mask=seen[None, :] & (dims < H)[:, None], other=0.0)
    v = tl.load(value_ptr + offset_v[:, None] + dims[None, :], mask=seen[:, None] & (dims < H)[None, :], other=0.0)
    return k, v, seen


@triton.jit
def attend_tile(q, k, v, seen, peak, total_weight, spread_weight, acc, scale, PRECISION: tl.constexpr):
    """Take a tile into the running softmax."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    scores = tl.where(seen[None, :], scores, HIDDEN)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_peak, total_weight * shrink, spread_weight * shrink[:, None] + weights, acc


@triton.jit(do_not_specialize=["num_seqs", "num_shares", "stride_t"])
def decode_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, tables_ptr, context_lens_ptr, ends_ptr, shares_ptr,
    partial_ptr, lse_ptr, arrived_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, scale, num_seqs, num_shares,
    stride_os, stride_on, stride_qs, stride_qn, stride_kb, stride_kp, stride_kk, stride_vb, stride_vp, stride_vk,
    stride_t, stride_table, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, REDUCE_R: tl.constexpr, REDUCE_C: tl.constexpr,
    PRECISION: tl.constexpr, SKIP: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, AHEAD: tl.constexpr,
    SINGLE_SEQ: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one share of the row for one KV head, a sequence (or a part of it) at a time.

    `partial` [K, W, 2, R, H] and `lse` [K, W, 2, R] hold the parts of sequences that are in several shares: place 0 the
    part with which a share begins, place 1 the part with which it ends. `arrived` [K, W] counts, for the sequence
    that starts in share w and goes on in the next, how many parts are there; it is 0 before and after.

    With `SKIP` = 0 queries are given and keys and values stored. With 1, `query` holds the whole QKV projection: the
    program norms and rotates its queries, and the one that has a sequence's end also its new key, which it stores with
    the new value, and attends to them from registers.

    `SINGLE_SEQ` says that no share has tiles of two sequences. Then, with `SKIP`, the first tile comes before the
    kernel before has ended: that one has nothing to do with what earlier steps stored.

    Programs without work end at once, but for the first: where nothing decodes, this kernel must not end before the one
    before it, whose results the next one reads.

    `WINDOW` is how many tokens, the new one included, a query sees; 0 for all.
    """
    pdl_launch(PDL)
    head = tl.program_id(0)
    share_id = tl.program_id(1)
    total = tl.load(ends_ptr + num_seqs - 1)
    share = tl.load(ends_ptr + num_seqs)
    seq = tl.load(shares_ptr + share_id * 4)
    begin = tl.load(shares_ptr + share_id * 4 + 1)
    end = tl.load(shares_ptr + share_id * 4 + 2)
    length = tl.load(shares_ptr + share_id * 4 + 3)
    tile = share_id * share
    last_tile = tl.minimum(tile + share, total)
    key_ptr += head * stride_kk
    value_ptr += head * stride_vk
    if PDL and AHEAD > 0:  # noqa: SIM102 (the one is known to the compiler, the other is not)
        if tile < last_tile:
            prefetch_context(
                key_ptr, value_ptr, tables_ptr + seq.to(tl.int64) * stride_t,
                (tile - begin + tiles_before_window(length + SKIP, WINDOW, BLOCK_N)) * BLOCK_N, length,
                stride_kb, stride_kp, stride_vb, stride_vp, H, P, AHEAD,
            )  # fmt: skip

    one = tl.arange(0, 1)[:, None]
    if SKIP == 1:
        q_weight, partner_q_weight = norm_weight(q_norm_ptr, H, BLOCK_H, Q_NORM)
        k_weight, partner_k_weight = norm_weight(k_norm_ptr, H, BLOCK_H, K_NORM)
    if SINGLE_SEQ and SKIP == 1:
        cos, sin = rotation(cos_ptr + length * stride_table, sin_ptr + length * stride_table, H, BLOCK_H)
        token = (tile - begin + tiles_before_window(length + SKIP, WINDOW, BLOCK_N)) * BLOCK_N
        there = tl.where(tile < last_tile, length, 0)
        table_ptr = tables_ptr + tl.minimum(seq, num_seqs - 1).to(tl.int64) * stride_t
        blocks = block_ids(table_ptr, token, there, P, BLOCK_N)
        first_k, first_v, first_seen = load_tile(
            key_ptr, value_ptr, blocks, token, there, stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H,
            BLOCK_N, SKIP, WINDOW,
        )  # fmt: skip

    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_H)
    row_mask = (rows < R)[:, None] & (dims < H)[None, :]
    heads = head * R + rows
    if (tile < last_tile) | (share_id == 0):  # others make room for programs that have work
        pdl_wait(PDL)

    while tile < last_tile:
        stop = tl.minimum(end, last_tile)
        next_end = tl.load(ends_ptr + seq + 1, mask=stop < last_tile, other=0)  # ahead of their use
        next_length = tl.load(context_lens_ptr + seq + 1, mask=stop < last_tile, other=0) - SKIP
        table_ptr = tables_ptr + seq.to(tl.int64) * stride_t
        query_row = query_ptr + seq.to(tl.int64) * stride_qs
        peak = tl.full([BLOCK_R], HIDDEN, tl.float32)
        total_weight = tl.zeros([BLOCK_R], tl.float32)
        spread_weight = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)  # added up after the loop, where warps meet anyway
        acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        if SKIP == 0:
            q = tl.load(query_row + heads[:, None] * stride_qn + dims[None, :], mask=row_mask, other=0.0)
        else:
            if not SINGLE_SEQ:
                cos, sin = rotation(cos_ptr + length * stride_table, sin_ptr + length * stride_table, H, BLOCK_H)
            few = tl.arange(0, REDUCE_R)[:, None]
            # All that may be needed is asked for at once.
            raw, partner = with_partner(query_row + (head * R + few) * H, few < R, H, BLOCK_H)
            raw_key, partner_key = with_partner(query_row + (K * R + head) * H + one, one == 0, H, BLOCK_H)
            value_row = query_row + (K * R + K + head) * H
            new_value = tl.load(value_row + one + dims[None, :], mask=(dims < H)[None, :], other=0.0)
            block = tl.load(table_ptr + length // P).to(tl.int64)
            q = normed_and_rotated(raw, partner, q_weight, partner_q_weight, cos, sin, eps, H, Q_NORM)
            # Repeated, for a product wants 16 rows. Working on as many before would take too many registers.
            q = tl.broadcast_to(q[None, :, :], BLOCK_R // REDUCE_R, REDUCE_R, BLOCK_H).reshape(BLOCK_R, BLOCK_H)
            if stop == end:
                new_key = normed_and_rotated(
                    raw_key, partner_key, k_weight, partner_k_weight, cos, sin, eps, H, K_NORM
                )  # fmt: skip
                place = block * stride_kb + length % P * stride_kp
                tl.store(key_ptr + place + one + dims[None, :], new_key, mask=(dims < H)[None, :])
                place = block * stride_vb + length % P * stride_vp
                tl.store(value_ptr + place + one + dims[None, :], new_value, mask=(dims < H)[None, :])
                peak = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), 1) * scale
                total_weight += 1.0
                acc += new_value.to(tl.float32)
        before = tiles_before_window(length + SKIP, WINDOW, BLOCK_N)
        token = (tile - begin + before) * BLOCK_N
        last_token = tl.minimum((stop - begin + before) * BLOCK_N, tl.maximum(length, 1))
        if SINGLE_SEQ and SKIP == 1:
            peak, total_weight, spread_weight, acc = attend_tile(
                q, first_k, first_v, first_seen, peak, total_weight, spread_weight, acc, scale, PRECISION
            )
            token += BLOCK_N
        blocks = block_ids(table_ptr, token, length, P, BLOCK_N)
        for start in range(token, last_token, BLOCK_N):
            next_blocks = block_ids(table_ptr, start + BLOCK_N, length, P, BLOCK_N)  # ahead of their use
            k, v, seen = load_tile(
                key_ptr, value_ptr, blocks, start, length, stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H,
                BLOCK_N, SKIP, WINDOW,
            )  # fmt: skip
            peak, total_weight, spread_weight, acc = attend_tile(
                q, k, v, seen, peak, total_weight, spread_weight, acc, scale, PRECISION
            )
            blocks = next_blocks
        total_weight += tl.sum(spread_weight, 1)
        acc = acc / total_weight[:, None]
        if stop - tile == end - begin:
            tl.store(
                out_ptr + seq.to(tl.int64) * stride_os + heads[:, None] * stride_on + dims[None, :],
                acc.to(out_ptr.dtype.element_ty), mask=row_mask,
            )  # fmt: skip
        else:
            part = (head * num_shares + share_id) * 2 + (tile != share_id * share).to(tl.int32)
            tl.store(partial_ptr + (part * R + rows)[:, None] * H + dims[None, :], acc, mask=row_mask)
            tl.store(lse_ptr + part * R + rows, peak + tl.log2(total_weight), mask=rows < R)
            first_share = begin // share
            num_parts = (end - 1) // share - first_share + 1
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter_ptr = arrived_ptr + head * num_shares + first_share
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_parts - 1:
                tl.store(counter_ptr, 0)
                combine(
                    out_ptr + seq.to(tl.int64) * stride_os + head * R * stride_on, partial_ptr, lse_ptr,
                    head * num_shares + first_share, num_parts, (begin % share != 0).to(tl.int32), stride_on,
                    R, H, REDUCE_R, BLOCK_H, REDUCE_C,
                )  # fmt: skip
        tile = stop
        seq += 1
        begin = end
        end = next_end
        length = next_length


@triton.jit
def combine(
    out_ptr, partial_ptr, lse_ptr, first, num_parts, first_place, stride_on,
    R: tl.constexpr, H: tl.constexpr, REDUCE_R: tl.constexpr, BLOCK_H: tl.constexpr, REDUCE_C: tl.constexpr,
):  # fmt: skip
    """Weigh the parts of one sequence by exp2(lse), `REDUCE_C` at a time, always in the same order."""
    rows = tl.arange(0, REDUCE_R)
    dims = tl.arange(0, BLOCK_H)
    mask = (rows < R)[:, None] & (dims < H)[None, :]
    peak = tl.full([REDUCE_R], HIDDEN, tl.float32)
    total_weight = tl.zeros([REDUCE_R], tl.float32)
    acc = tl.zeros([REDUCE_R, BLOCK_H], tl.float32)
    for start in range(0, num_parts, REDUCE_C):
        parts = start + tl.arange(0, REDUCE_C)
        there = parts < num_parts
        places = (first + parts) * 2 + tl.where(parts == 0, first_place, 0)
        places_CR = places[:, None] * R + rows[None, :]
        lse = tl.load(lse_ptr + places_CR, mask=there[:, None] & (rows < R)[None, :], other=HIDDEN)
        values = tl.load(
            partial_ptr + places_CR[:, :, None] * H + dims[None, None, :],
            mask=there[:, None, None] & mask[None, :, :], other=0.0,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights = tl.where(there[:, None], tl.exp2(lse - new_peak[None, :]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        total_weight = total_weight * shrink + tl.sum(weights, 0)
        peak = new_peak
    acc = acc / total_weight[:, None]
    tl.store(out_ptr + rows[:, None] * stride_on + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
