"""Paged attention in plain PyTorch, a sequence at a time: what every other backend must compute."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.plugins.attention.options import TorchConfig


class ReferenceAttention(AttentionBackend):
    """The cache is one tensor a layer for keys and one for values, each [B, P, K, H]."""

    def __init__(self, config: TorchConfig, context: AttentionContext) -> None:
        self.context = context
        self.windows = context.windows or (None,) * context.num_layers
        self.slots_T: torch.Tensor
        self.inputs: AttentionInput
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def bytes_per_block(self) -> int:
        return self.context.bytes_per_block

    def allocate(self, num_blocks: int) -> None:
        c = self.context
        shape = (num_blocks, c.block_size * c.num_kv_heads * c.head_dim)
        self.keys = [_zeros(shape, c) for _ in range(c.num_layers)]
        self.values = [_zeros(shape, c) for _ in range(c.num_layers)]

    def plan(self, inputs: AttentionInput) -> None:
        self.inputs, self.slots_T = inputs, inputs.slot_mapping_T

    @property
    def slot_mapping_T(self) -> torch.Tensor:
        return self.slots_T

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, self.context.block_size, self.context.num_kv_heads, self.context.head_dim)
        return self.keys[layer].view(shape), self.values[layer].view(shape)

    def store(self, layer: int, key_TKH: torch.Tensor, value_TKH: torch.Tensor) -> None:
        for cache, new in ((self.keys[layer], key_TKH), (self.values[layer], value_TKH)):
            cache.view(-1, new.shape[1] * new.shape[2]).index_copy_(0, self.slots_T, new.flatten(1))

    def project_and_attend(self, layer: int, projection: Projection) -> None:
        return None  # there is no kernel for it: norm and rotation, `store` and `attend` one after the other

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        queries = query_TNH.split(self.inputs.query_lens.tolist())
        lens = self.inputs.context_lens.tolist()
        ones = zip(queries, lens, self.inputs.block_tables_SB, strict=True)
        return torch.cat([self._attend_one(layer, *one) for one in ones])

    def _attend_one(
        self, layer: int, query_QNH: torch.Tensor, context_len: int, blocks_B: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one sequence: its last Q tokens over its L tokens in the cache, [Q, N, H]."""
        blocks = blocks_B[: -(-context_len // self.context.block_size)]
        key_KLH, value_KLH = (cache[blocks].flatten(0, 1)[:context_len].transpose(0, 1) for cache in self.cache(layer))
        key_L = torch.arange(context_len, device=query_QNH.device)
        own_Q1 = key_L[context_len - len(query_QNH) :].unsqueeze(-1)  # each query's own token
        seen_QL = key_L <= own_Q1
        if (window := self.windows[layer]) is not None:
            seen_QL &= key_L > own_Q1 - window
        return F.scaled_dot_product_attention(
            query_QNH.transpose(0, 1), key_KLH, value_KLH, attn_mask=seen_QL, scale=self.context.scale, enable_gqa=True
        ).transpose(0, 1)


def _zeros(shape: tuple[int, int], context: AttentionContext) -> torch.Tensor:
    if context.device.type == "cpu":
        # numpy's zeros take memory only once they are written to, so that a roomy cache costs a small run nothing.
        return (
            torch.from_numpy(np.zeros(shape[0] * shape[1] * context.dtype.itemsize, np.uint8))
            .view(context.dtype)
            .view(shape)
        )
    return torch.zeros(shape, dtype=context.dtype, device=context.device)
