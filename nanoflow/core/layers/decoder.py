"""Decoders of the Llama family (Touvron et al., 2023), and the blocks that their layers are made of.

Attention and feed-forward stand behind a norm each and are added to the residual. The sum of what a block gave and the
residual is left to the norm of the next one, which may fuse the two. So a block takes its norm, what the block before
gave and the residual, and returns what it gives itself and the residual that this is yet to be added to (None, if a
kernel has done so).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard
from nanoflow.core.layers.activation import require_silu
from nanoflow.core.layers.attention import attend
from nanoflow.core.layers.decoder_config import completed
from nanoflow.core.layers.embedding import Embedding
from nanoflow.core.layers.norm import RMSNorm
from nanoflow.core.layers.parallel_linear import GatedLinear, QKVLinear, RowParallelLinear
from nanoflow.core.layers.rotary import RotaryEmbedding
from nanoflow.core.layers.weighted import Weighted
from nanoflow.core.ops.attention import Rotation


class Attention(Weighted):
    """Grouped-query attention: fused QKV projection, rotation, attention, output projection.

    Args:
        context: as the decoder gives it to `Decoder.layer`.
        layer: whose cache.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: whether each query and key head is normed before its rotation.
    """

    def __init__(
        self, context: ModelContext, layer: int, *, qkv_bias: bool = False, out_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        config = context.hf_config
        hidden, head_dim, num_heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
        self.ops, self.layer = context.ops, layer
        self.qkv_proj = QKVLinear(context, hidden, num_heads, config["num_key_value_heads"], head_dim, qkv_bias)
        self.o_proj = RowParallelLinear(context, num_heads * head_dim, {"o_proj": hidden}, out_bias)
        self.q_norm = RMSNorm(context, head_dim, config["rms_norm_eps"]) if qk_norm else None
        self.k_norm = RMSNorm(context, head_dim, config["rms_norm_eps"]) if qk_norm else None

    def forward(
        self, norm: RMSNorm, x: torch.Tensor | RankPartials | None, residual: torch.Tensor, rotation: Rotation,
        attention: AttentionBackend,
    ) -> tuple[torch.Tensor | RankPartials | None, torch.Tensor]:  # fmt: skip
        qkv, residual = self.qkv_proj.norm_linear(norm, x, residual)
        out = attend(self.ops, qkv, self.q_norm, self.k_norm, rotation, attention, self.layer)
        return self.o_proj.linear_residual(out.flatten(-2), residual)


class FeedForward(Weighted):
    """down(silu(gate(x)) * up(x)), with gate and up in one GEMM (SwiGLU; Shazeer, 2020).

    Raises:
        CheckpointError: a config that asks for another activation than SiLU.
    """

    def __init__(self, context: ModelContext, *, bias: bool = False) -> None:
        super().__init__()
        require_silu(context.hf_config)
        hidden, inner = context.hf_config["hidden_size"], context.hf_config["intermediate_size"]
        self.gate_up_proj = GatedLinear(context, hidden, {"gate_proj": inner, "up_proj": inner}, bias)
        self.down_proj = RowParallelLinear(context, inner, {"down_proj": hidden}, bias)

    def forward(
        self, norm: RMSNorm, x: torch.Tensor | RankPartials | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor | RankPartials | None, torch.Tensor]:
        gated, residual = self.gate_up_proj.norm_linear(norm, x, residual)
        return self.down_proj.linear_residual(gated, residual)


class DecoderLayer(Weighted):
    """Attention, then feed-forward, a norm before each of them.

    Args:
        context: as the decoder gives it to `Decoder.layer`.
        attention: any module with the `forward` and `weights` of `Attention`.
        feed_forward: any module with the `forward` and `weights` of `FeedForward`.
        norms: the norm before attention and the one before the feed-forward, any modules with the `add` and `weights`
            of `RMSNorm`; None for two of these.
    """

    def __init__(
        self, context: ModelContext, attention: nn.Module, feed_forward: nn.Module,
        norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.self_attn = attention
        self.mlp = feed_forward
        self.input_layernorm, self.post_attention_layernorm = norms or (hidden_norm(context), hidden_norm(context))

    def forward(
        self, x: torch.Tensor | RankPartials | None, residual: torch.Tensor, rotation: Rotation,
        attention: AttentionBackend,
    ) -> tuple[torch.Tensor | RankPartials | None, torch.Tensor]:  # fmt: skip
        x, residual = self.self_attn(self.input_layernorm, x, residual, rotation, attention)
        return self.mlp(self.post_attention_layernorm, x, residual)


def hidden_norm(context: ModelContext) -> RMSNorm:
    """The RMSNorm of hidden states that config.json describes."""
    return RMSNorm(context, context.hf_config["hidden_size"], context.hf_config["rms_norm_eps"])


class Decoder(nn.Module, ModelArch):
    """Token embedding, layers, norm and head. A model is a subclass that says what its layers are made of.

    It may bring layers of its own making (`layer`) and another norm (`last_norm`); what config.json says of activations
    and norms is for the parts that are used to judge.

    Attributes:
        defaults: of keys that a config.json of this architecture may leave out; see `decoder_config.completed`.

    Raises:
        CheckpointError: a config with values that can't be.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        context = replace(context, hf_config=completed(context.hf_config, self.defaults))
        config = context.hf_config
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.scale = self.head_dim**-0.5
        windows = (self.window(config, index) for index in range(self.num_layers))
        self.windows = tuple(w if w and w < context.max_model_len else None for w in windows)
        self.vocab_size = config["vocab_size"]
        self.tied = config["tie_word_embeddings"]
        self.embed_tokens = Embedding(context, self.vocab_size, config["hidden_size"])
        self.lm_head = self.embed_tokens if self.tied else Embedding(context, self.vocab_size, config["hidden_size"])
        self.rotary = RotaryEmbedding(context, self.head_dim)
        self.layers = nn.ModuleList(self.layer(context, index) for index in range(self.num_layers))
        self.norm = self.last_norm(context)

    @abstractmethod
    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        """One layer. No key of `context.hf_config` that has a default is missing."""

    def last_norm(self, context: ModelContext) -> nn.Module:
        """The norm behind the last layer: any module with the `add` and `weights` of `RMSNorm`."""
        return hidden_norm(context)

    def window(self, config: dict[str, Any], index: int) -> int | None:
        """How many tokens, the last ones, a token attends to in a layer; None for all of them."""
        return None

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        rotation = self.rotary(positions_T)
        x, residual = self.embed_tokens.partials(input_ids_T)
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
