"""Qwen2 and Qwen2.5 (Qwen rank_group, 2024): grouped-query attention with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Qwen2(Decoder):
    """Qwen2ForCausalLM. Layers from `max_window_layers` on, or those that `layer_types` names, may have a window."""

    defaults: ClassVar[dict[str, Any]] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, Attention(context, index, qkv_bias=True), FeedForward(context))

    def window(self, config: dict[str, Any], index: int) -> int | None:
        if not config["use_sliding_window"]:
            return None
        types = config.get("layer_types")
        is_sliding = index >= config["max_window_layers"] if types is None else types[index] == "sliding_attention"
        return config["sliding_window"] if is_sliding else None
