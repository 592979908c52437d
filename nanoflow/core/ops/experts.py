"""Sparse mixture of experts (Shazeer et al., 2017), routed by a softmax over all experts as in Qwen's models.

Shape suffixes: X experts, C chosen ones of a token, F inner size of an expert on this rank.
"""

from __future__ import annotations

import torch

from nanoflow.core.ops.linear import linear


def mix_experts(
    x_TD: torch.Tensor, logits_TX: torch.Tensor, gate_up_X2FD: torch.Tensor, down_XDF: torch.Tensor, num_chosen: int,
    *, renormalize: bool,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of a token's chosen experts' results [T, D], or partials [C, T, D] that add up to it.

    Args:
        x_TD: any row stride.
        logits_TX: the router's.
        gate_up_X2FD, down_XDF: the experts' weights, contiguous; an expert is down(silu(gate(x)) * up(x)).
        num_chosen: C.
        renormalize: whether a token's weights are scaled to sum up to 1.
    """
    weights_TC, chosen_TC = route(logits_TX, num_chosen, renormalize=renormalize)
    return mix_chosen(x_TD, weights_TC, chosen_TC, gate_up_X2FD, down_XDF)


def route(logits_TX: torch.Tensor, num_chosen: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest experts of each token: float32 weights [T, C], and ids [T, C]."""
    weights_TC, chosen_TC = logits_TX.softmax(-1, dtype=torch.float32).topk(num_chosen)
    if renormalize:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC, chosen_TC


def mix_chosen(
    x_TD: torch.Tensor, weights_TC: torch.Tensor, chosen_TC: torch.Tensor, gate_up_X2FD: torch.Tensor,
    down_XDF: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of the chosen experts' results [T, D], expert by expert."""
    out_TD = torch.zeros_like(x_TD)
    for expert in chosen_TC.unique().tolist():
        tokens, choices = torch.where(chosen_TC == expert)
        inner = linear(x_TD[tokens], gate_up_X2FD[expert].flatten(0, 1), gate=True)
        result = linear(inner, down_XDF[expert]) * weights_TC[tokens, choices, None]
        out_TD.index_add_(0, tokens, result.to(x_TD.dtype))
    return out_TD
