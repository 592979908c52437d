"""What the GPU backends share: the cache, and the split of a batch into decoding sequences and chunks."""

from __future__ import annotations

from abc import abstractmethod

import torch

from nanoflow.core.interfaces import AttentionBackend, AttentionContext
from nanoflow.core.types import AttentionInput


class PagedAttention(AttentionBackend):
    """Serves the leading sequences with one new token by `decode`, and the others by `prefill`.

    The cache of a layer is one tensor [B, K, P, H]: all tokens of a block for one head lie together, so that a kernel,
    which reads one head's tokens, reads long runs of memory.

    What depends on the batch alone is computed on the device by the first layer's call, not by `plan`: so it is part of
    a captured CUDA graph and follows the lengths that a replay finds.
    """

    capturable = True

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
        if inputs.num_decodes:
            self.plan_decode(inputs)
        if inputs.num_decodes < len(inputs.query_lens):
            self.plan_prefill(inputs)

    @property
    def slot_mapping_T(self) -> torch.Tensor:
        return self.inputs.slot_mapping_T

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        num_decodes, num_tokens = self.inputs.num_decodes, query_TNH.shape[0]
        if num_decodes == num_tokens:
            return self.decode(layer, query_TNH)
        if num_decodes == 0:
            return self.prefill(layer, query_TNH)
        out_TNH = torch.empty(query_TNH.shape, dtype=query_TNH.dtype, device=query_TNH.device)
        self.decode(layer, query_TNH[:num_decodes], out_TNH[:num_decodes])
        self.prefill(layer, query_TNH[num_decodes:], out_TNH[num_decodes:])
        return out_TNH

    @abstractmethod
    def plan_decode(self, inputs: AttentionInput) -> None:
        """Prepare for the batch's first `inputs.num_decodes` sequences."""

    @abstractmethod
    def plan_prefill(self, inputs: AttentionInput) -> None:
        """Prepare for the others."""

    @abstractmethod
    def decode(self, layer: int, query_SNH: torch.Tensor, out_SNH: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of the leading sequences, one token each; layer 0 is the first in a step.

        Returns [S, N, H], which is `out_SNH` if that is given.
        """

    @abstractmethod
    def prefill(self, layer: int, query_TNH: torch.Tensor, out_TNH: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of the other sequences, in the same way."""
