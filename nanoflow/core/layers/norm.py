"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dim (Zhang and Sennrich, 2019)."""

    def __init__(self, context: ModelContext, size: int, eps: float) -> None:
        super().__init__()
        self.ops = context.ops
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=context.dtype, device=context.device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor | RankPartials | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The norm of `x + residual` [T, D], and that sum, which is the next residual and may overwrite this one.

        None stands for x = 0, and [C, T, D] for partials of x.
        """
        if isinstance(x, RankPartials):
            return x.group.allreduce_add_norm(x.part, residual, self.weight, self.eps)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        """The checkpoint tensor `prefix` + "weight"."""
        return {f"{prefix}weight": self.weight}
