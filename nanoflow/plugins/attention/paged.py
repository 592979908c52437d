"""What the GPU backends share: the cache, and the split between decode steps and all others."""

from __future__ import annotations

from abc import abstractmethod

import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput


class PagedAttention(AttentionBackend):
    """Serves steps in which every sequence decodes by `decode`, and all others by `mix`.

    The cache of a layer is one tensor [B, K, P, H]: all tokens of a block for one head lie together, so that a kernel,
    which reads one head's tokens, reads long runs of memory.

    All that depends on lengths is worked out on the device, so a captured step follows the lengths that a replay finds.
    """

    capturable = True
    capturable_chunks = True

    def __init__(self, context: AttentionContext) -> None:
        self.context = context
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.inputs: AttentionInput

    @property
    def bytes_per_block(self) -> int:
        return self.context.bytes_per_block

    def allocate(self, num_blocks: int) -> None:
        c = self.context
        shape = (num_blocks, c.num_kv_heads, c.block_size, c.head_dim)
        self.keys = [torch.zeros(shape, dtype=c.dtype, device=c.device) for _ in range(c.num_layers)]
        self.values = [torch.zeros(shape, dtype=c.dtype, device=c.device) for _ in range(c.num_layers)]

    def plan(self, inputs: AttentionInput) -> None:
        self.inputs = inputs
        if inputs.num_decodes == inputs.num_seqs:
            self.plan_decode(inputs)
        else:
            self.plan_mix(inputs)

    @property
    def slot_mapping_T(self) -> torch.Tensor:
        return self.inputs.slot_mapping_T

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        if self.inputs.num_decodes == self.inputs.num_seqs:
            return self.decode(layer, query_TNH)
        return self.mix(layer, query_TNH)

    @abstractmethod
    def plan_decode(self, inputs: AttentionInput) -> None:
        """Prepare for a step in which every sequence has one token."""

    @abstractmethod
    def plan_mix(self, inputs: AttentionInput) -> None:
        """Prepare for any other step."""

    @abstractmethod
    def decode(self, layer: int, query_SNH: torch.Tensor) -> torch.Tensor:
        """Attention [S, N, H] in a step in which every sequence has one token."""

    @abstractmethod
    def mix(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        """Attention [T, N, H] in any other step."""
