"""Qwen3, dense (Qwen rank_group, 2025): Qwen2 with a norm on each query and key head in place of biases."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, DecoderLayer, FeedForward
from nanoflow.plugins.models.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen3ForCausalLM."""

    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "head_dim": 128, "attention_bias": False}

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, self.attention(context, index), FeedForward(context))

    def attention(self, context: ModelContext, index: int) -> Attention:
        """With biases in all projections or in none."""
        bias = context.hf_config["attention_bias"]
        return Attention(context, index, qkv_bias=bias, out_bias=bias, qk_norm=True)
