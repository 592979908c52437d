"""Prefill attention over a paged cache: chunks of any length after a cached prefix, each with its own context.

FlashAttention-2 (Dao, 2023): one program a tile of queries, which goes over the keys with a running softmax. A tile
holds the query heads of one KV head side by side, so that short chunks fill it and keys are read once for all of them.
Tiles are listed on the device, those of a sequence that see most first; so a captured step can follow its lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.plugins.attention.triton.settings import PrefillSettings
from nanoflow.plugins.attention.triton.tiles import HIDDEN, LOG2_E, block_ids, tiles_before_window


@triton.jit(do_not_specialize=["num_seqs", "num_tiles"])
def tile_kernel(
    query_start_ptr, context_lens_ptr, tiles_ptr, num_seqs, num_tiles,
    QUERIES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BESIDE_DECODES: tl.constexpr,
):  # fmt: skip
    """List tiles of at most `QUERIES` queries of one sequence, int32 [W, 4].

    A tile is described by its sequence, its first query's place in the batch, how many queries it has, and how many
    tokens its first query sees. Those that there is no use for have no queries. `BESIDE_DECODES` leaves out the leading
    sequences that have one query.
    """
    seqs = tl.arange(0, BLOCK_S)
    valid = seqs < num_seqs
    starts = tl.load(query_start_ptr + seqs, mask=valid, other=0)
    lens = tl.load(query_start_ptr + seqs + 1, mask=valid, other=0) - starts
    contexts = tl.load(context_lens_ptr + seqs, mask=valid, other=0)
    if BESIDE_DECODES:
        lens = tl.where((starts == seqs) & (lens == 1), 0, lens)
    counts = tl.cdiv(lens, QUERIES)
    ends = tl.cumsum(counts, 0)
    tiles = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    seq = tl.sum((ends[None, :] <= tiles[:, None]).to(tl.int32), 1)  # of no sequence: BLOCK_S
    here = seqs[None, :] == seq[:, None]
    start = tl.sum(tl.where(here, starts[None, :], 0), 1)
    length = tl.sum(tl.where(here, lens[None, :], 0), 1)
    context = tl.sum(tl.where(here, contexts[None, :], 0), 1)
    skipped = (tl.sum(tl.where(here, ends[None, :], 0), 1) - 1 - tiles) * QUERIES  # the last queries first
    skipped = tl.where(seq < BLOCK_S, skipped, 0)
    there = tiles < num_tiles
    tl.store(tiles_ptr + tiles * 4, seq, mask=there)
    tl.store(tiles_ptr + tiles * 4 + 1, start + skipped, mask=there)
    tl.store(tiles_ptr + tiles * 4 + 2, tl.minimum(length - skipped, QUERIES), mask=there)
    tl.store(tiles_ptr + tiles * 4 + 3, context - length + skipped + 1, mask=there)


@triton.jit
def attend_tiles(
    acc, peak, total_weight, q, start, stop, last_key, length, key_ptr, value_ptr, table_ptr, scale,
    stride_kb, stride_kp, stride_vb, stride_vp,
    H: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Take keys `start` to `stop` into the running softmax; `MASKED` if not every row sees all of them."""
    dims = tl.arange(0, BLOCK_H)
    dims_mask = dims < H
    tokens_N = tl.arange(0, BLOCK_N)
    blocks = block_ids(table_ptr, start, length, P, BLOCK_N)
    for token in range(start, stop, BLOCK_N):
        tokens = token + tokens_N
        place = tokens % P
        k_ptrs = key_ptr + (blocks.to(tl.int64) * stride_kb + place * stride_kp)[None, :] + dims[:, None]
        v_ptrs = value_ptr + (blocks.to(tl.int64) * stride_vb + place * stride_vp)[:, None] + dims[None, :]
        blocks = block_ids(table_ptr, token + BLOCK_N, length, P, BLOCK_N)  # the next tile's, ahead of their use
        if MASKED:
            there = tokens < length
            k = tl.load(k_ptrs, mask=there[None, :] & dims_mask[:, None], other=0.0)
        elif BLOCK_H == H:
            k = tl.load(k_ptrs)
        else:
            k = tl.load(k_ptrs, mask=dims_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(tokens[None, :] <= last_key[:, None], scores, HIDDEN)
            if WINDOW > 0:
                scores = tl.where(tokens[None, :] > last_key[:, None] - WINDOW, scores, HIDDEN)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total_weight = total_weight * shrink + tl.sum(weights, 1)
        peak = new_peak
        if MASKED:
            v = tl.load(v_ptrs, mask=there[:, None] & dims_mask[None, :], other=0.0)
        elif BLOCK_H == H:
            v = tl.load(v_ptrs)
        else:
            v = tl.load(v_ptrs, mask=dims_mask[None, :], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, peak, total_weight


@triton.jit(do_not_specialize=["stride_t"])
def prefill_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, tables_ptr, tiles_ptr, scale,
    stride_ot, stride_on, stride_qt, stride_qn, stride_kb, stride_kp, stride_kk, stride_vb, stride_vp, stride_vk,
    stride_t, R: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program: one tile, described as `tile_kernel` does it, with the R query heads of one KV head.

    `WINDOW` is how many tokens, itself included, a query sees; 0 for all.
    """
    head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 4
    num_queries = tl.load(tile_ptr + 2)
    if num_queries == 0:
        return
    seq = tl.load(tile_ptr).to(tl.int64)
    first_query = tl.load(tile_ptr + 1)
    num_seen = tl.load(tile_ptr + 3)
    length = num_seen + num_queries - 1  # tokens that its last query sees

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_H)
    queries = rows // R
    heads = head * R + rows % R
    mask = (queries < num_queries)[:, None] & (dims < H)[None, :]
    tokens = (first_query + queries).to(tl.int64)
    q = tl.load(query_ptr + (tokens * stride_qt + heads * stride_qn)[:, None] + dims[None, :], mask=mask, other=0.0)
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total_weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)

    key_ptr += head * stride_kk
    value_ptr += head * stride_vk
    table_ptr = tables_ptr + seq * stride_t
    last_key = num_seen - 1 + queries
    if WINDOW > 0:
        masked_from = tiles_before_window(num_seen, WINDOW, BLOCK_N) * BLOCK_N  # what the first query sees
    else:
        masked_from = num_seen // BLOCK_N * BLOCK_N
        acc, peak, total_weight = attend_tiles(
            acc, peak, total_weight, q, 0, masked_from, last_key, length, key_ptr, value_ptr, table_ptr, scale,
            stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H, BLOCK_N, PRECISION, False, WINDOW,
        )  # fmt: skip
    acc, peak, total_weight = attend_tiles(
        acc, peak, total_weight, q, masked_from, length, last_key, length, key_ptr, value_ptr, table_ptr, scale,
        stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H, BLOCK_N, PRECISION, True, WINDOW,
    )  # fmt: skip
    acc = acc / total_weight[:, None]
    tl.store(
        out_ptr + (tokens * stride_ot + heads * stride_on)[:, None] + dims[None, :],
        acc.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


class TritonPrefill:
    """Lists the tiles of a step and launches the kernel."""

    def __init__(self, context: AttentionContext, settings: PrefillSettings) -> None:
        c = self.context = context
        self.settings = settings
        group = c.num_heads // c.num_kv_heads
        self.queries_per_tile = settings.block_m // group
        self.constants = {
            "R": group, "H": c.head_dim, "P": c.block_size, "BLOCK_H": triton.next_power_of_2(c.head_dim),
            "BLOCK_M": settings.block_m, "BLOCK_N": settings.block_n,
            "PRECISION": "ieee" if c.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def tiles(self, inputs: AttentionInput, *, beside_decodes: bool) -> torch.Tensor:
        """Tiles of all queries, as `tile_kernel` lists them; perhaps without those of the leading decodes."""
        num_seqs = inputs.num_seqs
        # Each sequence has at most one tile that isn't full.
        num_tiles = len(inputs.slot_mapping_T) // self.queries_per_tile + num_seqs
        tiles_W4 = torch.empty((num_tiles, 4), dtype=torch.int32, device=self.context.device)
        tile_kernel[(triton.cdiv(num_tiles, 16),)](
            inputs.query_start_S1, inputs.context_lens_S, tiles_W4, num_seqs, num_tiles, QUERIES=self.queries_per_tile,
            BLOCK_S=max(32, triton.next_power_of_2(num_seqs)), BLOCK_W=16, BESIDE_DECODES=beside_decodes,
        )  # fmt: skip
        return tiles_W4

    def __call__(
        self, tiles_W4: torch.Tensor, inputs: AttentionInput, query_TNH: torch.Tensor, key_BPKH: torch.Tensor,
        value_BPKH: torch.Tensor, out_TNH: torch.Tensor, *, window: int | None = None,
    ) -> None:  # fmt: skip
        """Attention of the queries in these tiles, in a layer of that window."""
        prefill_kernel[(self.context.num_kv_heads, len(tiles_W4))](
            out_TNH, query_TNH, key_BPKH, value_BPKH, inputs.block_tables_SB, tiles_W4, self.context.scale * LOG2_E,
            *out_TNH.stride()[:2], *query_TNH.stride()[:2], *key_BPKH.stride()[:3], *value_BPKH.stride()[:3],
            inputs.block_tables_SB.stride(0), **self.constants, WINDOW=window or 0,
            num_warps=self.settings.num_warps, num_stages=self.settings.num_stages,
        )  # fmt: skip
