"""Llama (Touvron et al., 2023) up to 3.3 (Grattafiori et al., 2024), and what is built alike: SmolLM2, TinyLlama."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import Attention, Decoder, DecoderLayer, FeedForward


class Llama(Decoder):
    """LlamaForCausalLM."""

    defaults: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        config = context.hf_config
        attention = Attention(context, index, qkv_bias=config["attention_bias"], out_bias=config["attention_bias"])
        return DecoderLayer(context, attention, FeedForward(context, bias=config["mlp_bias"]))
