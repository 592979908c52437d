"""Qwen3-MoE (Qwen rank_group, 2025), such as Qwen3-30B-A3B: Qwen3 with a mixture of experts in most layers."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import DecoderLayer, Experts, FeedForward
from nanoflow.plugins.models.qwen3 import Qwen3


class Qwen3MoE(Qwen3):
    """Qwen3MoeForCausalLM. Every `decoder_sparse_step`th layer has experts, if `mlp_only_layers` doesn't name it."""

    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4, "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": False,
    }  # fmt: skip

    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        config = context.hf_config
        num_experts = config.get("num_local_experts", config["num_experts"])  # transformers 5 writes the former
        if index in config["mlp_only_layers"] or (index + 1) % config["decoder_sparse_step"] or not num_experts:
            return DecoderLayer(context, self.attention(context, index), FeedForward(context))
        if config["num_experts_per_tok"] > num_experts:
            raise CheckpointError(
                f"The checkpoint's config.json chooses num_experts_per_tok={config['num_experts_per_tok']} of "
                f"{num_experts} experts; it can choose no more than there are."
            )
        experts = Experts(
            context, config["hidden_size"], config["moe_intermediate_size"], num_experts,
            config["num_experts_per_tok"], renormalize=config["norm_topk_prob"],
        )  # fmt: skip
        return DecoderLayer(context, self.attention(context, index), experts)

    def window(self, config: dict[str, Any], index: int) -> int | None:
        return config["sliding_window"] if config["use_sliding_window"] else None
