"""Linear layers, several of them fused into one product where they share their input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.core.interfaces import ModelContext


class Linear(nn.Module):
    """y = x Wᵀ + b, where W stacks the outputs of one or several checkpoint layers.

    Args:
        context: dtype and device of the parameters.
        in_features: size of x's last dim.
        parts: output size of each checkpoint layer by its name, such as `{"gate_proj": F, "up_proj": F}`, in the order
            in which y holds them.
        bias: whether each of them has one.
    """

    def __init__(self, context: ModelContext, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        place = {"dtype": context.dtype, "device": context.device}
        out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """Checkpoint names under `prefix` -> the rows of the fused parameters that they fill."""
        sizes = list(self.parts.values())
        found = {f"{prefix}{part}.weight": w for part, w in zip(self.parts, self.weight.split(sizes), strict=True)}
        if self.bias is not None:
            found |= {f"{prefix}{part}.bias": b for part, b in zip(self.parts, self.bias.split(sizes), strict=True)}
        return found
