"""Qwen3 (dense): grouped-query attention with normed queries and keys, gated feed-forward (Qwen team, 2025)."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.errors import CheckpointError
from nanoflow.core.interfaces import AttentionBackend, ModelArch, ModelContext
from nanoflow.core.layers import (
    Embedding,
    GatedLinear,
    QKVLinear,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    RowParallelLinear,
    attend,
)
from nanoflow.core.parallel import Shard


class Qwen3Attention(nn.Module):
    """Fused QKV projection behind a norm, norm of each query and key head, rotation, attention, output projection."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        config = context.hf_config
        self.layer = layer
        hidden, size, num_heads = config["hidden_size"], head_dim(context), config["num_attention_heads"]
        bias = config.get("attention_bias", False)
        self.qkv_proj = QKVLinear(context, hidden, num_heads, num_kv_heads(context), size, bias)
        self.o_proj = RowParallelLinear(context, num_heads * size, {"o_proj": hidden}, bias)
        self.q_norm = RMSNorm(context, size, config["rms_norm_eps"])
        self.k_norm = RMSNorm(context, size, config["rms_norm_eps"])

    def forward(
        self, norm: RMSNorm, x: torch.Tensor | None, residual: torch.Tensor, rotation: Rotation,
        attention: AttentionBackend,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        qkv, residual = self.qkv_proj.normed(norm, x, residual)
        out = attend(qkv, self.q_norm, self.k_norm, rotation, attention, self.layer)
        return self.o_proj.summands(out.flatten(-2)), residual

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        return (
            self.qkv_proj.weights(prefix)
            | self.o_proj.weights(prefix)
            | self.q_norm.weights(prefix + "q_norm.")
            | self.k_norm.weights(prefix + "k_norm.")
        )


class Qwen3MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) behind a norm, with gate and up in one product."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        hidden, inner = context.hf_config["hidden_size"], context.hf_config["intermediate_size"]
        self.gate_up_proj = GatedLinear(context, hidden, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = RowParallelLinear(context, inner, {"down_proj": hidden})

    def forward(self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gated, residual = self.gate_up_proj.normed(norm, x, residual)
        return self.down_proj.summands(gated), residual

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        return self.gate_up_proj.weights(prefix) | self.down_proj.weights(prefix)


class Qwen3Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual.

    The sum of what a block gave and the residual is left to the norm of the next one, which may fuse the two.
    """

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        hidden, eps = context.hf_config["hidden_size"], context.hf_config["rms_norm_eps"]
        self.self_attn = Qwen3Attention(context, layer)
        self.mlp = Qwen3MLP(context)
        self.input_layernorm = RMSNorm(context, hidden, eps)
        self.post_attention_layernorm = RMSNorm(context, hidden, eps)

    def forward(
        self, x: torch.Tensor | None, residual: torch.Tensor, rotation: Rotation, attention: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.self_attn(self.input_layernorm, x, residual, rotation, attention)
        return self.mlp(self.post_attention_layernorm, x, residual)

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        return (
            self.self_attn.weights(prefix + "self_attn.")
            | self.mlp.weights(prefix + "mlp.")
            | self.input_layernorm.weights(prefix + "input_layernorm.")
            | self.post_attention_layernorm.weights(prefix + "post_attention_layernorm.")
        )


class Qwen3(nn.Module, ModelArch):
    """Qwen3ForCausalLM.

    Raises:
        CheckpointError: a config that asks for what is not built here (sliding window, another activation).
    """

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.hf_config
        if config.get("use_sliding_window"):
            raise CheckpointError("The checkpoint uses sliding-window attention, which model=qwen3 does not serve.")
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"The checkpoint's hidden_act is {config['hidden_act']!r}; model=qwen3 serves 'silu'."
            )
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = num_kv_heads(context)
        self.head_dim = head_dim(context)
        self.scale = self.head_dim**-0.5
        self.vocab_size = config["vocab_size"]
        self.tied = config.get("tie_word_embeddings", False)
        self.embed_tokens = Embedding(context, self.vocab_size, config["hidden_size"])
        self.lm_head = self.embed_tokens if self.tied else Embedding(context, self.vocab_size, config["hidden_size"])
        self.rotary = RotaryEmbedding(context, self.head_dim)
        self.layers = nn.ModuleList(Qwen3Layer(context, layer) for layer in range(self.num_layers))
        self.norm = RMSNorm(context, config["hidden_size"], config["rms_norm_eps"])

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        rotation = self.rotary(positions_T)
        residual = self.embed_tokens(input_ids_T)
        x = None
        for layer in self.layers:
            x, residual = layer(x, residual, rotation, attention)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden_SD)

    def weights(self) -> dict[str, torch.Tensor | Shard | None]:
        found: dict[str, torch.Tensor | Shard | None] = {"lm_head.weight": None}
        if not self.tied:
            found |= self.lm_head.weights("lm_head.weight")
        found |= self.embed_tokens.weights("model.embed_tokens.weight") | self.norm.weights("model.norm.")
        for index, layer in enumerate(self.layers):
            found |= layer.weights(f"model.layers.{index}.")
        return found


def head_dim(context: ModelContext) -> int:
    """H; Qwen3 sets it apart from hidden size / heads."""
    return context.hf_config.get("head_dim", 128)


def num_kv_heads(context: ModelContext) -> int:
    """K"""
    return context.hf_config.get("num_key_value_heads") or context.hf_config["num_attention_heads"]
