"""`attention=hybrid`: each part of a batch by the kernel that is faster at it."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.attention.flash.backend import FlashCalls
from nanoflow.plugins.attention.flash.versions import Rows
from nanoflow.plugins.attention.triton.backend import TritonAttention


class HybridAttention(TritonAttention):
    """Decodes with the Triton kernel, which is nearer to the memory's bandwidth, and prefills with FlashAttention."""

    def __init__(self, config: NoOptions, context: AttentionContext) -> None:
        super().__init__(config, context)
        self.flash = FlashCalls(context)
        self.chunks: dict[int | None, Rows] = {}  # by a layer's window

    def plan_mix(self, inputs: AttentionInput) -> None:
        self.plan_decode(inputs)
        windows = self.context.distinct_windows
        self.chunks = {window: self.flash.chunks(inputs, window, beside_decodes=True) for window in windows}

    def mix(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        window = self.context.window(layer)
        out_TNH = self.flash(self.chunks[window], query_TNH, *self.cache(layer))
        self.decoder(self.shares[window], self.inputs, query_TNH, *self.cache(layer), out_TNH)
        return out_TNH
