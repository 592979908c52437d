"""Paged attention in plain PyTorch, for any device: the reference for every other backend, and the CPU's own.

Sequences of one query length and similar context lengths are gathered from the cache into one padded batch and given
to PyTorch's scaled-dot-product attention together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanoflow.core.interfaces import AttentionBackend, AttentionContext, NoOptions
from nanoflow.core.types import AttentionInput

# A group may pad its gathered contexts by this share, and by as many tokens as cost less than one more group.
PADDING_SHARE = 0.25
PADDING_TOKENS = 512


@dataclass(slots=True)
class Group:
    """G sequences with q query tokens each, whose contexts are padded to L tokens.

    Attributes:
        tokens_GQ: where their queries lie in the batch, flattened; None if the group is the whole batch in order.
        blocks_GB: ids of their blocks, flattened.
        mask_G1QL: which keys each query may see; queries repeat for each query head of a KV head. None if all.
        size: G.
        context_len: L.
    """

    tokens_GQ: torch.Tensor | None
    blocks_GB: torch.Tensor
    mask_G1QL: torch.Tensor | None
    size: int
    context_len: int


class TorchAttention(AttentionBackend):
    """The cache is one tensor a layer for keys and one for values, each [B, P, K, H]."""

    def __init__(self, config: NoOptions, context: AttentionContext) -> None:
        self.context = context
        self.num_groups = context.num_heads // context.num_kv_heads  # R, query heads of a KV head
        self.slots: torch.Tensor
        self.groups: list[Group] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def bytes_per_block(self) -> int:
        c = self.context
        return 2 * c.num_layers * c.block_size * c.num_kv_heads * c.head_dim * c.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        c = self.context
        shape = (num_blocks, c.block_size * c.num_kv_heads * c.head_dim)
        self.keys = [_zeros(shape, c) for _ in range(c.num_layers)]
        self.values = [_zeros(shape, c) for _ in range(c.num_layers)]

    def plan(self, inputs: AttentionInput) -> None:
        self.slots = inputs.slot_mapping_T
        starts = np.cumsum(inputs.query_lens) - inputs.query_lens
        self.groups = [self._group(inputs, starts, rows) for rows in similar(inputs.query_lens, inputs.context_lens)]
        if len(self.groups) == 1:
            self.groups[0].tokens_GQ = None

    def forward(
        self, layer: int, query_TNH: torch.Tensor, key_TKH: torch.Tensor, value_TKH: torch.Tensor
    ) -> torch.Tensor:
        for cache, new in ((self.keys[layer], key_TKH), (self.values[layer], value_TKH)):
            cache.view(-1, new.shape[1] * new.shape[2]).index_copy_(0, self.slots, new.flatten(1))
        if self.groups[0].tokens_GQ is None:
            return self._attend(self.groups[0], layer, query_TNH)
        out_TNH = torch.empty_like(query_TNH, memory_format=torch.contiguous_format)
        for group in self.groups:
            out_TNH[group.tokens_GQ] = self._attend(group, layer, query_TNH[group.tokens_GQ])
        return out_TNH

    def _attend(self, group: Group, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        """Attention of one group: its queries and its result are [G * q, N, H].

        The query heads of a KV head are laid out as further queries, so that keys and values are not repeated.
        """
        c, R = self.context, self.num_groups
        query = query_TNH.view(group.size, -1, c.num_kv_heads, R, c.head_dim)
        num_queries = query.shape[1]
        query = query.permute(0, 2, 3, 1, 4).reshape(group.size, c.num_kv_heads, R * num_queries, c.head_dim)
        key, value = (self._gather(cache[layer], group) for cache in (self.keys, self.values))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask_G1QL, scale=c.scale)
        out = out.view(group.size, c.num_kv_heads, R, num_queries, c.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(-1, c.num_heads, c.head_dim)

    def _gather(self, cache: torch.Tensor, group: Group) -> torch.Tensor:
        """[G, K, L, H]"""
        c = self.context
        gathered = cache.index_select(0, group.blocks_GB)
        gathered = gathered.view(group.size, -1, c.num_kv_heads, c.head_dim)
        return gathered[:, : group.context_len].transpose(1, 2)

    def _group(self, inputs: AttentionInput, starts: np.ndarray, rows: np.ndarray) -> Group:
        c = self.context
        device = inputs.slot_mapping_T.device
        num_queries = int(inputs.query_lens[rows[0]])
        context_lens = inputs.context_lens[rows]
        context_len = int(context_lens.max())
        num_blocks = -(-context_len // c.block_size)
        tokens = (starts[rows, None] + np.arange(num_queries)).ravel()
        rows_G = torch.from_numpy(rows).to(device)
        mask = None
        if num_queries > 1 or context_lens.min() < context_len:
            last_key_GQ = context_lens[:, None] - num_queries + np.arange(num_queries)
            seen_GQL = np.arange(context_len) <= last_key_GQ[:, :, None]
            mask = torch.from_numpy(seen_GQL).to(device).repeat(1, self.num_groups, 1).unsqueeze(1)
        return Group(
            tokens_GQ=torch.from_numpy(tokens).to(device),
            blocks_GB=inputs.block_tables_SB[rows_G, :num_blocks].flatten(),
            mask_G1QL=mask,
            size=len(rows),
            context_len=context_len,
        )


def similar(query_lens: np.ndarray, context_lens: np.ndarray) -> list[np.ndarray]:
    """Split sequences into groups of equal query length, such that padding each context to its group's longest is cheap.

    Returns the indices of each group. A batch that makes a single group comes in its own order.
    """
    if query_lens.min() == query_lens.max() and _padding(context_lens) <= _allowance(context_lens):
        return [np.arange(len(query_lens))]
    order = np.lexsort((-context_lens, query_lens))
    groups, first = [], 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            members = context_lens[order[first : end + 1]]
            same = query_lens[order[end]] == query_lens[order[first]]
            if same and _padding(members) <= _allowance(members):
                continue
        groups.append(order[first:end])
        first = end
    return groups


def _padding(context_lens: np.ndarray) -> int:
    return int(context_lens.max()) * len(context_lens) - int(context_lens.sum())


def _allowance(context_lens: np.ndarray) -> float:
    return PADDING_TOKENS + PADDING_SHARE * float(context_lens.sum())


def _zeros(shape: tuple[int, int], context: AttentionContext) -> torch.Tensor:
    if context.device.type == "cpu":
        # numpy's zeros take memory only once they are written to, so that a roomy cache costs a small run nothing.
        return (
            torch.from_numpy(np.zeros(shape[0] * shape[1] * context.dtype.itemsize, np.uint8))
            .view(context.dtype)
            .view(shape)
        )
    return torch.zeros(shape, dtype=context.dtype, device=context.device)
