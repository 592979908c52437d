"""RMSNorm (Zhang and Sennrich, 2019), alone or with the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dim, computed in float32 and returned in x's dtype.

    Args:
        x: [..., D]
        weight: [D], of x's dtype.
        eps: added to the mean square.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor | None, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual addition + RMSNorm: the norm of x + residual [T, D], and that sum, which is the next residual.

    Args:
        x: [T, D]; or [C, T, D], partials that add up to it: split-K ones in float32, or experts' results; None for 0.
        residual_TD: any row stride; may be overwritten with the sum.
        weight_D, eps: as in `rms_norm`.
    """
    if x is not None:
        residual_TD = (x if x.dim() == 2 else x.sum(0).to(residual_TD.dtype)) + residual_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD
