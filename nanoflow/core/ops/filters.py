"""Filters: what of a distribution may be drawn at all (top-k, top-p, min-p)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Filters:
    """Limits of S rows on what they may draw, on the logits' device. They apply in this order.

    Attributes:
        top_k_S: int64; the k best; V or more keeps all.
        top_p_S: float32; the likeliest that hold this share of what top_k left; 1 keeps all.
        min_p_S: float32; no less likely than this times the likeliest; 0 keeps all.
    """

    top_k_S: torch.Tensor
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor

    def take(self, index: torch.Tensor) -> Filters:
        """Those of some rows."""
        return Filters(self.top_k_S[index], self.top_p_S[index], self.min_p_S[index])

    def apply(self, scores_SV: torch.Tensor) -> torch.Tensor:
        """Scores [S, V], float32, with -inf for what may not be drawn."""
        if (self.top_k_S < scores_SV.shape[-1]).any() or (self.top_p_S < 1).any():
            scores_SV = keep_top(scores_SV, self.top_k_S.unsqueeze(-1), self.top_p_S.unsqueeze(-1))
        return keep_likely(scores_SV, self.min_p_S.unsqueeze(-1))


def keep_top(scores_SV: torch.Tensor, top_k_S1: torch.Tensor, top_p_S1: torch.Tensor) -> torch.Tensor:
    """-inf for all but the `top_k` best, and of these for all past the first whose probabilities reach `top_p`.

    One sort serves both. Candidates that tie with the last one kept are kept: what is kept is all from some score on.
    """
    ranked = scores_SV.sort(-1, descending=True).values
    last = (top_k_S1 - 1).clamp(0, scores_SV.shape[-1] - 1)
    lowest = ranked.gather(-1, last)
    probabilities = ranked.masked_fill(ranked < lowest, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    last = ((before < top_p_S1).sum(-1, keepdim=True) - 1).clamp(min=0)
    lowest = torch.where(top_p_S1 < 1, torch.maximum(lowest, ranked.gather(-1, last)), lowest)
    return scores_SV.masked_fill(scores_SV < lowest, -torch.inf)


def keep_likely(scores_SV: torch.Tensor, min_p_S1: torch.Tensor) -> torch.Tensor:
    """-inf for candidates less likely than `min_p` times the likeliest."""
    return scores_SV.masked_fill(scores_SV < scores_SV.amax(-1, keepdim=True) + min_p_S1.log(), -torch.inf)
