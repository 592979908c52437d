"""Prefill attention over a paged cache: chunks of any length after a cached prefix, each with its own context.

FlashAttention-2 (Dao, 2023): one program a tile of queries, which goes over the keys with a running softmax. A tile
holds the query heads of one KV head side by side, so that short chunks fill it and keys are read once for all of them.
Tiles are listed on the host with the longest first, so that the last ones to finish are short.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from nanoflow.core.interfaces import AttentionContext
from nanoflow.core.types import AttentionInput
from nanoflow.plugins.attention.triton_decode import HIDDEN, LOG2_E, block_ids
from nanoflow.plugins.attention.triton_settings import PrefillSettings


@triton.jit
def attend_tiles(
    acc, peak, total_weight, q, start, stop, last_key, length, key_ptr, value_ptr, table_ptr, scale,
    stride_kb, stride_kp, stride_vb, stride_vp,
    H: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
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
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of BLOCK_M // R query tokens with the R query heads of one KV head.

    A tile is described by 4 numbers: its sequence, its first query's place in the batch, how many queries it has, and
    how many tokens its first query sees.
    """
    head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 4
    seq = tl.load(tile_ptr).to(tl.int64)
    first_query = tl.load(tile_ptr + 1)
    num_queries = tl.load(tile_ptr + 2)
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
    seen_by_all = num_seen // BLOCK_N * BLOCK_N
    last_key = num_seen - 1 + queries
    acc, peak, total_weight = attend_tiles(
        acc, peak, total_weight, q, 0, seen_by_all, last_key, length, key_ptr, value_ptr, table_ptr, scale,
        stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, peak, total_weight = attend_tiles(
        acc, peak, total_weight, q, seen_by_all, length, last_key, length, key_ptr, value_ptr, table_ptr, scale,
        stride_kb, stride_kp, stride_vb, stride_vp, H, P, BLOCK_H, BLOCK_N, PRECISION, True,
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

    def tiles(self, inputs: AttentionInput) -> torch.Tensor:
        """int32 [tiles, 4] on the device, as `prefill_kernel` reads them."""
        tiles = list_tiles(inputs.query_lens, inputs.context_lens, inputs.num_decodes, self.queries_per_tile)
        tensor = torch.from_numpy(tiles)
        if self.context.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.context.device, non_blocking=True)

    def __call__(
        self, tiles: torch.Tensor, inputs: AttentionInput, query_TNH: torch.Tensor, key_BPKH: torch.Tensor,
        value_BPKH: torch.Tensor, out_TNH: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the sequences after the leading `num_decodes`, whose tokens `query_TNH` and `out_TNH` hold."""
        prefill_kernel[(self.context.num_kv_heads, len(tiles))](
            out_TNH, query_TNH, key_BPKH, value_BPKH, inputs.block_tables_SB, tiles, self.context.scale * LOG2_E,
            *out_TNH.stride()[:2], *query_TNH.stride()[:2], *key_BPKH.stride()[:3], *value_BPKH.stride()[:3],
            inputs.block_tables_SB.stride(0), **self.constants,
            num_warps=self.settings.num_warps, num_stages=self.settings.num_stages,
        )  # fmt: skip


def list_tiles(query_lens: np.ndarray, context_lens: np.ndarray, num_decodes: int, queries_per_tile: int) -> np.ndarray:
    """Tiles of the sequences from `num_decodes` on, those that see most first.

    int32 rows: sequence, first query (counted from the first token that is not a decode's), number of queries, tokens
    that the first query sees.
    """
    lens, contexts = query_lens[num_decodes:], context_lens[num_decodes:]
    counts = -(-lens // queries_per_tile)
    seqs = np.repeat(np.arange(len(lens)), counts)
    skipped = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * queries_per_tile
    first = np.cumsum(lens) - lens
    tiles = np.stack(
        [
            seqs + num_decodes,
            first[seqs] + skipped,
            np.minimum(lens[seqs] - skipped, queries_per_tile),
            contexts[seqs] - lens[seqs] + skipped + 1,
        ],
        axis=1,
    )
    return tiles[np.argsort(-tiles[:, 3], kind="stable")].astype(np.int32)
