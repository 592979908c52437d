"""Qwen3, dense (Qwen team, 2025): Qwen2 with normed queries and keys in place of biases."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.interfaces import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Qwen3(Decoder):
    """Qwen3ForCausalLM."""

    defaults: ClassVar[dict[str, Any]] = {"head_dim": 128, "attention_bias": False}

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        bias = context.hf_config["attention_bias"]
        attention = Attention(context, index, qkv_bias=bias, out_bias=bias, qk_norm=True)
        return DecoderLayer(context, attention, FeedForward(context))
