"""Mistral (Jiang et al., 2023): Llama without biases; some versions attend within a sliding window."""

from __future__ import annotations

from typing import Any

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Mistral(Decoder):
    """MistralForCausalLM."""

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, Attention(context, index), FeedForward(context))

    def window(self, config: dict[str, Any], index: int) -> int | None:
        return config.get("sliding_window")
