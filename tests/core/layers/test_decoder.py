"""A decoder whose subclass brings parts of its own: an activation, a feed-forward and norms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import ParallelContext, RankPartials
from nanoflow.core.layers import (
    Attention,
    ColumnParallelLinear,
    Decoder,
    DecoderLayer,
    Experts,
    FeedForward,
    RowParallelLinear,
    add_partials,
)
from nanoflow.testing.ranks import on_ranks
from tests.core.layers.test_layers import Cache
from tests.core.sentences import raises_sentence

HIDDEN, INNER, HEADS, HEAD_DIM, VOCAB = 24, 20, 2, 8, 12
CONFIG = {
    "hidden_act": "gelu", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "layer_norm_eps": 1e-5,
}  # fmt: skip
CONTEXT = ModelContext(CONFIG, torch.float32, torch.device("cpu"), 32)


class LayerNorm(nn.LayerNorm):
    def __init__(self, context: ModelContext) -> None:
        config = context.hf_config
        super().__init__(config["hidden_size"], config["layer_norm_eps"])

    def add(
        self, x: torch.Tensor | RankPartials | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        residual = add_partials(x, residual)
        return self(residual), residual

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + "weight": self.weight, prefix + "bias": self.bias}


class GELUFeedForward(nn.Module):
    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(context, HIDDEN, {"up": INNER})
        self.down = RowParallelLinear(context, INNER, {"down": HIDDEN})

    def forward(self, norm: LayerNorm, x: torch.Tensor | RankPartials | None, residual: torch.Tensor) -> object:
        hidden, residual = self.up.norm_linear(norm, x, residual)
        return self.down.linear_residual(F.gelu(hidden), residual)

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        return self.up.weights(prefix) | self.down.weights(prefix)


class OwnParts(Decoder):
    def layer(self, context: ModelContext, index: int) -> DecoderLayer:
        norms = LayerNorm(context), LayerNorm(context)
        return DecoderLayer(context, Attention(context, index), GELUFeedForward(context), norms)

    def last_norm(self, context: ModelContext) -> nn.Module:
        return LayerNorm(context)


class QueriesBack(Cache):
    """Attention that gives queries back; with all tokens at position 0 nothing is rotated."""

    def __init__(self, parallel: ParallelContext) -> None:
        self.tensors = torch.zeros(2, 2, 4, HEADS // parallel.size, HEAD_DIM)


def fill(model: Decoder) -> dict[str, torch.Tensor]:
    """The whole checkpoint, of which the model gets its part."""
    checkpoint = {}
    for index, (name, target) in enumerate(sorted(model.weights().items())):
        if target is None:
            continue
        is_shard = not isinstance(target, torch.Tensor)
        shape = target.whole_shape if is_shard else target.shape
        whole = checkpoint[name] = torch.randn(shape, generator=torch.Generator().manual_seed(index)) / 4
        (target.target if is_shard else target).copy_(whole[target.index] if is_shard else whole)
    return checkpoint


def expected(w: dict[str, torch.Tensor], ids_T: torch.Tensor) -> torch.Tensor:
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (HIDDEN,), w[name + ".weight"], w[name + ".bias"], 1e-5)

    x = w["model.embed_tokens.weight"][ids_T]
    for layer in ("model.layers.0.", "model.layers.1."):
        queries = norm(layer + "input_layernorm", x) @ w[layer + "self_attn.q_proj.weight"].T
        x = x + queries @ w[layer + "self_attn.o_proj.weight"].T
        inner = F.gelu(norm(layer + "post_attention_layernorm", x) @ w[layer + "mlp.up.weight"].T)
        x = x + inner @ w[layer + "mlp.down.weight"].T
    return norm("model.norm", x) @ w["lm_head.weight"].T


@pytest.mark.parametrize(("size", "in_norm"), [(1, False), (2, False), (2, True)])
def test_parts_of_its_own(size: int, in_norm: bool) -> None:
    ids_T = torch.tensor([3, 7, 11])

    def work(parallel: ParallelContext) -> torch.Tensor:
        with torch.inference_mode():
            model = OwnParts(replace(CONTEXT, parallel=parallel))
            checkpoint = fill(model)
            hidden = model.forward(ids_T, torch.zeros_like(ids_T), QueriesBack(parallel))
            logits = parallel.all_gather(model.compute_logits(hidden))
            torch.testing.assert_close(logits, expected(checkpoint, ids_T), rtol=1e-4, atol=1e-4)
            return logits

    first, *others = on_ranks(size, work, in_norm=in_norm)
    assert all(torch.equal(first, other) for other in others)


def test_who_has_silu_alone_says_so() -> None:
    for make in (FeedForward, lambda context: Experts(context, HIDDEN, INNER, 4, 2, renormalize=True)):
        with raises_sentence(CheckpointError, "The checkpoint's hidden_act is 'gelu'; 'silu' is what is served."):
            make(CONTEXT)
