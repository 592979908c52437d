"""Mistral (Jiang et al., 2023): Llama without biases; some versions attend within a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Mistral(Decoder):
    """MistralForCausalLM."""

    defaults: ClassVar[dict[str, Any]] = {"num_key_value_heads": 8, "sliding_window": 4096}

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        return DecoderLayer(context, Attention(context, index), FeedForward(context))

    def window(self, config: dict[str, Any], index: int) -> int | None:
        return config["sliding_window"]
