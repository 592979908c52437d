"""Sparse mixture of experts: gated feed-forward layers, of which a router picks a few for each token.

Shazeer et al. (2017); routing by a softmax over all experts as in Qwen's models. Shape suffixes, beside those of
`core.types`: X experts, C chosen ones of a token, F inner size of an expert on this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard
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
        ConfigError: the inner size can't be split evenly over the ranks.
    """

    def __init__(
        self, context: ModelContext, hidden_size: int, inner_size: int, num_experts: int, num_chosen: int, *,
        renormalize: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.parallel = context.parallel
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
        if hidden_TD.is_cuda:
            from nanoflow.core.kernels import experts

            out = experts.mix_experts(
                hidden_TD, logits_TX, self.gate_up_X2FD, self.down_XDF, self.num_chosen, renormalize=self.renormalize
            )  # partials, which the next norm adds up
        else:
            weights_TC, chosen_TC = route(logits_TX, self.num_chosen, renormalize=self.renormalize)
            out = mix_experts(hidden_TD, weights_TC, chosen_TC, self.gate_up_X2FD, self.down_XDF)
        return self.parallel.partials(out, hidden_TD.dtype), residual

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        """The tensors of each expert apart, as checkpoints on the Hub have them."""
        found = self.router.weights(prefix)
        for expert, ((gate_FD, up_FD), down_DF) in enumerate(zip(self.gate_up_X2FD, self.down_XDF, strict=True)):
            for name, view, dim in (("gate_proj", gate_FD, 0), ("up_proj", up_FD, 0), ("down_proj", down_DF, 1)):
                whole = self.parallel.size == 1
                found[f"{prefix}experts.{expert}.{name}.weight"] = view if whole else Shard(view, dim, self.share)
        return found


def route(logits_TX: torch.Tensor, num_chosen: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest experts of each token: float32 weights [T, C], and ids [T, C]."""
    weights_TC, chosen_TC = logits_TX.softmax(-1, dtype=torch.float32).topk(num_chosen)
    if renormalize:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC, chosen_TC


def mix_experts(
    x_TD: torch.Tensor, weights_TC: torch.Tensor, chosen_TC: torch.Tensor, gate_up_X2FD: torch.Tensor,
    down_XDF: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of the chosen experts' results [T, D], expert by expert."""
    out_TD = torch.zeros_like(x_TD)
    for expert in chosen_TC.unique().tolist():
        tokens, choices = torch.where(chosen_TC == expert)
        gate, up = F.linear(x_TD[tokens], gate_up_X2FD[expert].flatten(0, 1)).chunk(2, -1)
        result = F.linear(F.silu(gate) * up, down_XDF[expert]) * weights_TC[tokens, choices, None]
        out_TD.index_add_(0, tokens, result.to(x_TD.dtype))
    return out_TD
