"""Paged attention in plain PyTorch, for any device: similar sequences together, which is the CPU's way.

Sequences of one query length and similar context lengths are gathered from the cache into one padded batch and given
to PyTorch's scaled-dot-product attention together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.plugins.attention.options import TorchConfig
from nanoflow.plugins.attention.torch.reference import ReferenceAttention

# A gathered tensor of more bytes falls out of a CPU's caches, and its memory is mapped afresh at every call.
GROUP_BYTES = 2**20
# Padding tokens that cost about as much as a group of its own.
PADDING_TOKENS = 512


@dataclass(slots=True)
class Group:
    """G sequences with q query tokens each, whose contexts are padded to L tokens.

    Attributes:
        size: G.
        context_len: L.
        blocks_GB: ids of their blocks, flattened.
        padding: places of padding among the tokens of these blocks. It may be another sequence's, and NaN, which a
            weight of 0 does not silence. None if there is none.
        biases: by the window of a layer, what to add to the scores [G, 1, Q, L]: 0 where a query may see a key, else
            -inf. Queries repeat for each query head of a KV head. None if all may see all.
    """

    size: int
    context_len: int
    blocks_GB: torch.Tensor
    padding: torch.Tensor | None
    biases: dict[int | None, torch.Tensor | None]


class TorchAttention(ReferenceAttention):
    """As `ReferenceAttention`, with similar sequences together."""

    def __init__(self, config: TorchConfig, context: AttentionContext) -> None:
        super().__init__(config, context)
        self.heads_per_kv_head = context.num_heads // context.num_kv_heads  # R, query heads of a KV head
        bytes_per_token = context.num_kv_heads * context.head_dim * context.dtype.itemsize
        self.max_tokens = GROUP_BYTES // bytes_per_token
        self.groups: list[Group] = []
        self.sizes: list[int] = []  # tokens in each group
        self.order_T: torch.Tensor  # the batch's tokens, group by group
        self.places_T: torch.Tensor  # the inverse of that order

    def plan(self, inputs: AttentionInput) -> None:
        super().plan(inputs)
        members = similar(inputs.query_lens, inputs.context_lens, self.max_tokens)
        self.groups = [self._group(inputs, rows_G) for rows_G in members]
        order_S = np.concatenate(members)
        query_lens = inputs.query_lens[order_S]
        starts = (np.cumsum(inputs.query_lens) - inputs.query_lens)[order_S]
        tokens_T = np.repeat(starts - np.cumsum(query_lens) + query_lens, query_lens) + np.arange(query_lens.sum())
        self.order_T = torch.from_numpy(tokens_T).to(self.context.device)
        self.places_T = torch.from_numpy(np.argsort(tokens_T)).to(self.context.device)
        self.sizes = [int(inputs.query_lens[rows_G].sum()) for rows_G in members]

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        if len(self.groups) == 1 and self.groups[0].size == 1:
            return self._attend(self.groups[0], layer, query_TNH)
        queries = query_TNH[self.order_T].split(self.sizes)
        outputs = [self._attend(group, layer, query) for group, query in zip(self.groups, queries, strict=True)]
        return torch.cat(outputs)[self.places_T]

    def _attend(self, group: Group, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        """Attention of one group: its queries and its result are [G * q, N, H].

        The query heads of a KV head are laid out as further queries, so that keys and values are not repeated.
        """
        c, R = self.context, self.heads_per_kv_head
        query = query_TNH.view(group.size, -1, c.num_kv_heads, R, c.head_dim)
        num_queries = query.shape[1]
        query = query.permute(0, 2, 3, 1, 4).reshape(group.size, c.num_kv_heads, R * num_queries, c.head_dim)
        key, value = (self._gather(cache[layer], group) for cache in (self.keys, self.values))
        bias_G1QL = group.biases[self.windows[layer]]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_G1QL, scale=c.scale)
        out = out.view(group.size, c.num_kv_heads, R, num_queries, c.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(-1, c.num_heads, c.head_dim)

    def _gather(self, cache: torch.Tensor, group: Group) -> torch.Tensor:
        """[G, K, L, H]"""
        c = self.context
        gathered = cache.index_select(0, group.blocks_GB)
        if group.padding is not None:
            gathered.view(-1, c.num_kv_heads * c.head_dim).index_fill_(0, group.padding, 0)
        gathered = gathered.view(group.size, -1, c.num_kv_heads, c.head_dim)
        return gathered[:, : group.context_len].transpose(1, 2)

    def _group(self, inputs: AttentionInput, rows_G: np.ndarray) -> Group:
        c = self.context
        num_queries = int(inputs.query_lens[rows_G[0]])
        context_lens = inputs.context_lens[rows_G]
        context_len = int(context_lens.max())
        num_blocks = -(-context_len // c.block_size)
        return Group(
            size=len(rows_G),
            context_len=context_len,
            blocks_GB=inputs.block_tables_SB[torch.from_numpy(rows_G).to(c.device), :num_blocks].flatten(),
            padding=self._padding(context_lens, num_blocks * c.block_size),
            biases={window: self._bias(num_queries, context_lens, window) for window in set(self.windows)},
        )

    def _padding(self, context_lens_G: np.ndarray, num_tokens: int) -> torch.Tensor | None:
        """`Group.padding`, of sequences that have `num_tokens` each in their blocks."""
        context_len = context_lens_G.max()
        if context_lens_G.min() == context_len:
            return None
        rows, places = np.nonzero(np.arange(context_len) >= context_lens_G[:, None])
        return torch.from_numpy(rows * num_tokens + places).to(self.context.device)

    def _bias(self, num_queries: int, context_lens_G: np.ndarray, window: int | None) -> torch.Tensor | None:
        c, context_len = self.context, int(context_lens_G.max())
        if num_queries == 1 and context_lens_G.min() == context_len and (window is None or context_len <= window):
            return None
        keys_L = np.arange(context_len)
        last_key_GQ1 = (context_lens_G[:, None] - num_queries + np.arange(num_queries))[:, :, None]
        hidden_GQL = keys_L > last_key_GQ1
        if window is not None:
            hidden_GQL |= keys_L <= last_key_GQ1 - window
        bias = torch.zeros(hidden_GQL.shape, dtype=c.dtype)
        bias = bias.masked_fill_(torch.from_numpy(hidden_GQL), -torch.inf)
        return bias.to(c.device).repeat(1, self.heads_per_kv_head, 1).unsqueeze(1)


def similar(query_lens: np.ndarray, context_lens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Split S sequences into groups that are cheap to attend to together.

    A group has equal query lengths, pads each context to its longest by at most `PADDING_TOKENS` in all, and holds at
    most `max_tokens` with its padding, or a single sequence. Returns the indices of each group.
    """
    order = np.lexsort((-context_lens, query_lens))
    queries, contexts = query_lens[order].tolist(), context_lens[order].tolist()
    groups, first, padding = [], 0, 0
    for end in range(1, len(order)):
        longest = contexts[first]
        padding += longest - contexts[end]
        if queries[end] != queries[first] or padding > PADDING_TOKENS or longest * (end + 1 - first) > max_tokens:
            groups.append(order[first:end])
            first, padding = end, 0
    groups.append(order[first:])
    return groups
