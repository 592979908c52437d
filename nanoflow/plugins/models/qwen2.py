"""Qwen2 and Qwen2.5 (Qwen rank_group, 2024): grouped-query attention with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Qwen2(Decoder):
    """Qwen2ForCausalLM. Layers from `max_window_layers` on, or those that `layer_types` names, may have a window."""

    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    }  # fmt: skip

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, Attention(context, index, qkv_bias=True), FeedForward(context))

    def window(self, config: dict[str, Any], index: int) -> int | None:
        window = config["sliding_window"] if config["use_sliding_window"] else None
        types = config.get("layer_types")
        if types is None:
            return window if index >= config["max_window_layers"] else None
        if types[index] != "sliding_attention":
            return None
        if window is None:
            raise CheckpointError(
                "The checkpoint's config.json has sliding_attention in layer_types, but use_sliding_window is false or "
                "sliding_window null; make it full_attention, or say how long the window is."
            )
        return window
