"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each block, GELU, a bias for every matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.plugin import (
    AttentionBackend,
    CheckpointError,
    ConfigError,
    Embedding,
    Linear,
    ModelArch,
    ModelContext,
)

APPROXIMATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class GPT2Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what goes in."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        config = context.hf_config
        hidden = config["n_embd"]
        inner = config.get("n_inner") or 4 * hidden
        self.layer = layer
        self.num_heads = config["n_head"]
        self.approximation = APPROXIMATIONS[config["activation_function"]]
        self.ln_1 = layer_norm(context)
        self.attn = nn.ModuleDict({
            "c_attn": Linear(context, hidden, {"c_attn": 3 * hidden}, bias=True),
            "c_proj": Linear(context, hidden, {"c_proj": hidden}, bias=True),
        })  # fmt: skip
        self.ln_2 = layer_norm(context)
        self.mlp = nn.ModuleDict({
            "c_fc": Linear(context, hidden, {"c_fc": inner}, bias=True),
            "c_proj": Linear(context, inner, {"c_proj": hidden}, bias=True),
        })  # fmt: skip

    def forward(self, x_TD: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        qkv = self.attn["c_attn"](self.ln_1(x_TD)).unflatten(-1, (3, self.num_heads, -1))
        attended_TNH = attention.forward(self.layer, *qkv.unbind(-3))
        x_TD = x_TD + self.attn["c_proj"](attended_TNH.flatten(-2))
        inner = F.gelu(self.mlp["c_fc"](self.ln_2(x_TD)), approximate=self.approximation)
        return x_TD + self.mlp["c_proj"](inner)

    def weights(self, prefix: str) -> dict[str, torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = dict.fromkeys([prefix + "attn.bias", prefix + "attn.masked_bias"])
        for name, parameter in self.named_parameters():
            # Checkpoints store matrices as [in, out] (`Conv1D`): each is copied into a transposed view.
            found[prefix + name] = parameter.t() if parameter.dim() == 2 else parameter
        return found


class GPT2(nn.Module, ModelArch):
    """GPT2LMHeadModel.

    Raises:
        CheckpointError: a config that asks for what is not built here.
        ConfigError: several ranks; queries, keys and values are one tensor in checkpoints, which is not split here.
    """

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.hf_config
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(key):
                raise CheckpointError(f"The checkpoint's config.json sets {key}, which model=gpt2 does not serve.")
        if config["activation_function"] not in APPROXIMATIONS:
            raise CheckpointError(
                f"The checkpoint's activation_function is {config['activation_function']!r}; model=gpt2 serves "
                f"{', '.join(APPROXIMATIONS)}."
            )
        if context.parallel.size > 1:
            raise ConfigError("model=gpt2 can't be split over ranks; set engine.tensor_parallel_size to 1.")
        self.num_layers = config["n_layer"]
        self.num_heads = self.num_kv_heads = config["n_head"]
        self.head_dim = config["n_embd"] // config["n_head"]
        self.scale = self.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        self.vocab_size = config["vocab_size"]
        self.tied = config.get("tie_word_embeddings", True)
        self.wte = Embedding(context, self.vocab_size, config["n_embd"])
        self.wpe = Embedding(context, config["n_positions"], config["n_embd"])
        self.h = nn.ModuleList(GPT2Layer(context, layer) for layer in range(self.num_layers))
        self.ln_f = layer_norm(context)
        self.lm_head = self.wte if self.tied else Embedding(context, self.vocab_size, config["n_embd"])

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        x_TD = self.wte(input_ids_T) + self.wpe(positions_T)
        for layer in self.h:
            x_TD = layer(x_TD, attention)
        return self.ln_f(x_TD)

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden_SD)

    def weights(self) -> dict[str, torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = {"lm_head.weight": None if self.tied else self.lm_head.weight}
        found |= {"transformer.wte.weight": self.wte.weight, "transformer.wpe.weight": self.wpe.weight}
        found |= {f"transformer.ln_f.{name}": parameter for name, parameter in self.ln_f.named_parameters()}
        for index, layer in enumerate(self.h):
            found |= layer.weights(f"transformer.h.{index}.")
        return found


def layer_norm(context: ModelContext) -> nn.LayerNorm:
    """With weight and bias, over the last dim."""
    config = context.hf_config
    place = {"dtype": context.dtype, "device": context.device}
    return nn.LayerNorm(config["n_embd"], config.get("layer_norm_epsilon", 1e-5), **place).requires_grad_(False)
