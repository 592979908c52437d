"""Decode attention over a paged cache: one query token a sequence, memory-bound, balanced over tokens.

The query heads of a KV head share one tile, so that keys and values are read once (FlashDecoding with packed GQA; Dao,
Haziza, Massa and Sizov, 2023). The work is cut in the manner of Stream-K (Osama et al., 2023): the tiles of all
sequences stand in one row, and each program takes an equal, contiguous share of it, whatever the sequences' lengths.
A sequence that lies in several shares leaves a partial result in each; the program that is last to finish its part
combines them, so there is no second kernel, and the order of the sum is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanoflow.core.interfaces import AttentionContext
from nanoflow.core.kernels.launch import begin as begin_overlapped
from nanoflow.core.kernels.launch import overlap
from nanoflow.core.types import AttentionInput
from nanoflow.plugins.attention.triton_settings import DecodeSettings

# Scores of hidden tokens. Finite, so that a tile in which all are hidden gives no NaN.
HIDDEN = tl.constexpr(-1.0e30)
LOG2_E = 1.4426950408889634


@triton.jit
def block_ids(table_ptr, token, length, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of tokens `token` to `token + BLOCK_N`: one id if a block holds them all, else one for each token."""
    if P >= BLOCK_N:
        ids = tl.load(table_ptr + token // P, mask=token < length, other=0)
    else:
        tokens = token + tl.arange(0, BLOCK_N)
        ids = tl.load(table_ptr + tokens // P, mask=tokens < length, other=0)
    return ids


@triton.jit(do_not_specialize=["num_seqs", "num_shares"])
def share_kernel(
    context_lens_ptr, ends_ptr, shares_ptr, num_seqs, num_shares,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Cut the row of tiles into equal shares.

    Writes `ends` [S], the place in the row after each sequence's last tile, and `shares` [W, 4]: the sequence in which
    a share begins, the places of its first tile and after its last one, and its context length. Every sequence has at
    least one tile, so that its output is written.
    """
    seqs = tl.arange(0, BLOCK_S)
    valid = seqs < num_seqs
    lens = tl.load(context_lens_ptr + seqs, mask=valid, other=0)
    tiles = tl.where(valid, tl.maximum(tl.cdiv(lens, BLOCK_N), 1), 0)
    ends = tl.cumsum(tiles, 0)
    share = tl.cdiv(tl.sum(tiles, 0), num_shares)
    shares = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    before = (ends[None, :] <= (shares * share)[:, None]) & valid[None, :]
    first = tl.sum(before.to(tl.int32), 1)
    is_first = seqs[None, :] == first[:, None]
    there = shares < num_shares
    tl.store(shares_ptr + shares * 4, first, mask=there)
    tl.store(shares_ptr + shares * 4 + 1, tl.max(tl.where(before, ends[None, :], 0), 1), mask=there)
    tl.store(shares_ptr + shares * 4 + 2, tl.sum(tl.where(is_first, ends[None, :], 0), 1), mask=there)
    tl.store(shares_ptr + shares * 4 + 3, tl.sum(tl.where(is_first, lens[None, :], 0), 1), mask=there)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + seqs, ends, mask=valid)


@triton.jit(do_not_specialize=["num_seqs", "num_shares", "stride_t"])
def decode_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, tables_ptr, context_lens_ptr, ends_ptr, shares_ptr,
    partial_ptr, lse_ptr, arrived_ptr, scale, num_seqs, num_shares,
    stride_os, stride_on, stride_qs, stride_qn, stride_kb, stride_kp, stride_kk, stride_vb, stride_vp, stride_vk,
    stride_t, R: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, REDUCE_R: tl.constexpr, REDUCE_C: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one share of the row for one KV head, a sequence (or a part of it) at a time.

    `partial` [K, W, 2, R, H] and `lse` [K, W, 2, R] hold the parts of sequences that are in several shares: place 0 the
    part with which a share begins, place 1 the part with which it ends. `arrived` [K, W] counts, for the sequence
    that starts in share w and goes on in the next, how many parts are there; it is 0 before and after.
    """
    begin_overlapped(PDL)
    head = tl.program_id(0)
    share_id = tl.program_id(1)
    total = tl.load(ends_ptr + num_seqs - 1)
    seq = tl.load(shares_ptr + share_id * 4)
    begin = tl.load(shares_ptr + share_id * 4 + 1)
    end = tl.load(shares_ptr + share_id * 4 + 2)
    length = tl.load(shares_ptr + share_id * 4 + 3)
    share = tl.cdiv(total, num_shares)
    tile = share_id * share
    last_tile = tl.minimum(tile + share, total)

    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_H)
    tokens_N = tl.arange(0, BLOCK_N)
    row_mask = (rows < R)[:, None] & (dims < H)[None, :]
    heads = head * R + rows

    while tile < last_tile:
        stop = tl.minimum(end, last_tile)
        next_end = tl.load(ends_ptr + seq + 1, mask=stop < last_tile, other=0)  # ahead of their use
        next_length = tl.load(context_lens_ptr + seq + 1, mask=stop < last_tile, other=0)
        table_ptr = tables_ptr + seq.to(tl.int64) * stride_t
        q = tl.load(
            query_ptr + seq.to(tl.int64) * stride_qs + heads[:, None] * stride_qn + dims[None, :],
            mask=row_mask,
            other=0.0,
        )
        peak = tl.full([BLOCK_R], HIDDEN, tl.float32)
        total_weight = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        token = (tile - begin) * BLOCK_N
        blocks = block_ids(table_ptr, token, length, P, BLOCK_N)
        for token in range((tile - begin) * BLOCK_N, (stop - begin) * BLOCK_N, BLOCK_N):
            tokens = token + tokens_N
            seen = tokens < length
            place = tokens % P
            offset_k = blocks.to(tl.int64) * stride_kb + place * stride_kp + head * stride_kk
            offset_v = blocks.to(tl.int64) * stride_vb + place * stride_vp + head * stride_vk
            blocks = block_ids(table_ptr, token + BLOCK_N, length, P, BLOCK_N)  # the next tile's, ahead of their use
            k = tl.load(
                key_ptr + offset_k[None, :] + dims[:, None], mask=seen[None, :] & (dims < H)[:, None], other=0.0
            )
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, HIDDEN)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total_weight = total_weight * shrink + tl.sum(weights, 1)
            peak = new_peak
            v = tl.load(
                value_ptr + offset_v[:, None] + dims[None, :], mask=seen[:, None] & (dims < H)[None, :], other=0.0
            )
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
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
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights = tl.where(there[:, None], tl.exp2(lse - new_peak[None, :]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        values = tl.load(
            partial_ptr + places_CR[:, :, None] * H + dims[None, None, :],
            mask=there[:, None, None] & mask[None, :, :], other=0.0,
        )  # fmt: skip
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        total_weight = total_weight * shrink + tl.sum(weights, 0)
        peak = new_peak
    acc = acc / total_weight[:, None]
    tl.store(out_ptr + rows[:, None] * stride_on + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(slots=True)
class Shares:
    """How one step's row of tiles is cut: `ends` and `shares` as in `share_kernel`."""

    ends_S: torch.Tensor
    shares_W4: torch.Tensor


class TritonDecode:
    """Launches the kernels and owns their buffers.

    Args:
        context: the attention shapes.
        settings: tile size, warps, pipeline stages and programs a multiprocessor for a number of sequences.
        num_sms: multiprocessors of the device.
    """

    def __init__(self, context: AttentionContext, settings: DecodeSettings, num_sms: int) -> None:
        c = self.context = context
        self.settings = settings
        self.num_shares = max(1, round(num_sms * settings.waves / c.num_kv_heads))
        self.group = c.num_heads // c.num_kv_heads
        parts = (c.num_kv_heads, self.num_shares, 2, self.group)
        self.partial = torch.empty((*parts, c.head_dim), dtype=torch.float32, device=c.device)
        self.lse = torch.empty(parts, dtype=torch.float32, device=c.device)
        self.arrived = torch.zeros(parts[:2], dtype=torch.int32, device=c.device)
        block_h, reduce_r = triton.next_power_of_2(c.head_dim), triton.next_power_of_2(self.group)
        self.constants = {
            "R": self.group, "H": c.head_dim, "P": c.block_size, "BLOCK_R": max(16, reduce_r), "BLOCK_H": block_h,
            "REDUCE_R": reduce_r, "REDUCE_C": max(1, 4096 // (block_h * reduce_r)),
            "PRECISION": "ieee" if c.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def shares(self, inputs: AttentionInput) -> Shares:
        """Cut the work of a step, on the device, from the lengths that are there when it runs."""
        num_seqs, device = inputs.num_decodes, self.context.device
        ends_S = torch.empty(num_seqs, dtype=torch.int32, device=device)
        shares_W4 = torch.empty((self.num_shares, 4), dtype=torch.int32, device=device)
        share_kernel[(triton.cdiv(self.num_shares, 8),)](
            inputs.context_lens_S, ends_S, shares_W4, num_seqs, self.num_shares,
            BLOCK_N=self.settings.block_n, BLOCK_S=max(32, triton.next_power_of_2(num_seqs)), BLOCK_W=8,
        )  # fmt: skip
        return Shares(ends_S, shares_W4)

    def __call__(
        self, shares: Shares, inputs: AttentionInput, query_SNH: torch.Tensor, key_BPKH: torch.Tensor,
        value_BPKH: torch.Tensor, out_SNH: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the leading sequences, with the work cut as `shares` says."""
        decode_kernel[(self.context.num_kv_heads, self.num_shares)](
            out_SNH, query_SNH, key_BPKH, value_BPKH, inputs.block_tables_SB, inputs.context_lens_S,
            shares.ends_S, shares.shares_W4, self.partial, self.lse, self.arrived, self.context.scale * LOG2_E,
            query_SNH.shape[0], self.num_shares, *out_SNH.stride()[:2], *query_SNH.stride()[:2],
            *key_BPKH.stride()[:3], *value_BPKH.stride()[:3], inputs.block_tables_SB.stride(0), **self.constants,
            BLOCK_N=self.settings.block_n, num_warps=self.settings.num_warps, num_stages=self.settings.num_stages,
            **overlap(out_SNH),
        )  # fmt: skip
