"""Qwen2 and Qwen2.5 (Qwen team, 2024): grouped-query attention with biases on queries, keys and values."""

from __future__ import annotations

from nanoflow.core.interfaces import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Qwen2(Decoder):
    """Qwen2ForCausalLM."""

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, Attention(context, index, qkv_bias=True), FeedForward(context))
