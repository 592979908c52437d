"""Sparse mixture of experts: gated feed-forward layers, of which a router picks a few for each token.

Shape suffixes as in `core.ops.experts`, which says how it is computed.
"""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard
from nanoflow.core.layers.activation import require_silu
from nanoflow.core.layers.linear import Linear
from nanoflow.core.layers.norm import RMSNorm


class Experts(nn.Module):
    """The sum of a token's chosen experts, each down(silu(gate(x)) * up(x)), by their weights in the router's softmax.

    Each rank has a share of the inner size of every expert.

    Args:
        context: dtype, device and ranks.
        hidden_size: D.
        inner_size: of an expert, over all ranks.
        num_experts: X.
        num_chosen: C.
        renormalize: whether the weights of the chosen ones are scaled to sum up to 1.

    Raises:
        CheckpointError: a config that asks for another activation than SiLU.
        ConfigError: the inner size can't be split evenly over the ranks.
    """

    def __init__(
        self, context: ModelContext, hidden_size: int, inner_size: int, num_experts: int, num_chosen: int, *,
        renormalize: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        require_silu(context.hf_config)
        self.ops, self.parallel = context.ops, context.parallel
        self.share = self.parallel.share(inner_size, "inner features of an expert")
        self.num_chosen = num_chosen
        self.renormalize = renormalize
        self.router = Linear(context, hidden_size, {"gate": num_experts})
        place = {"dtype": context.dtype, "device": context.device}
        inner = self.share.length
        gate_up = torch.empty(num_experts, 2, inner, hidden_size, **place)
        down = torch.empty(num_experts, hidden_size, inner, **place)
        self.gate_up_X2FD = nn.Parameter(gate_up, requires_grad=False)
        self.down_XDF = nn.Parameter(down, requires_grad=False)

    def forward(
        self, norm: RMSNorm, x: torch.Tensor | RankPartials | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor | RankPartials, torch.Tensor]:
        hidden_TD, residual = norm.add(x, residual)
        logits_TX = self.router(hidden_TD)
        out = self.ops.mix_experts(
            hidden_TD, logits_TX, self.gate_up_X2FD, self.down_XDF, self.num_chosen, renormalize=self.renormalize
        )  # may be partials, which the next norm adds up
        return self.parallel.partials(out, hidden_TD.dtype), residual

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        """The tensors of each expert apart, as checkpoints on the Hub have them."""
        found = self.router.weights(prefix)
        for expert, ((gate_FD, up_FD), down_DF) in enumerate(zip(self.gate_up_X2FD, self.down_XDF, strict=True)):
            for name, view, dim in (("gate_proj", gate_FD, 0), ("up_proj", up_FD, 0), ("down_proj", down_DF, 1)):
                whole = self.parallel.size == 1
                found[f"{prefix}experts.{expert}.{name}.weight"] = view if whole else Shard(view, dim, self.share)
        return found
