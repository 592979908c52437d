"""Linear layers: GEMM with what may stand behind it. The fused operations have no PyTorch way of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, gate: bool = False,
    may_split: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ + b [M, N]; with `gate` (SwiGLU, Shazeer 2020) silu of its first half times its second half [M, N / 2].

    Args:
        x_MK: any row stride.
        weight_NK: of x's dtype; its last dim is contiguous.
        bias_N: None for 0.
        gate: see above; then N is even, and gates come first.
        may_split: whether the result may be split-K partials instead, float32 [C, M, N], which add up to it.
    """
    y_MN = F.linear(x_MK, weight_NK, bias_N)
    if not gate:
        return y_MN
    gates, ups = y_MN.chunk(2, -1)
    return F.silu(gates) * ups


def norm_linear(
    x_MK: torch.Tensor, norm_K: torch.Tensor, eps: float, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *,
    gate: bool,
) -> torch.Tensor | None:  # fmt: skip
    """RMSNorm + linear: `linear` of `rms_norm(x_MK, norm_K, eps)`. None: make two operations of it.

    Args:
        x_MK, weight_NK, bias_N, gate: as in `linear`.
        norm_K, eps: as in `rms_norm`.
    """
    return None


def linear_residual(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, residual_MN: torch.Tensor
) -> torch.Tensor | None:
    """Linear + residual: `linear` rounded to x's dtype, plus the residual. None: make two operations of it.

    Args:
        x_MK, weight_NK, bias_N: as in `linear`.
        residual_MN: of x's dtype; overwritten with the result, which is returned, unless that is None.
    """
    return None
