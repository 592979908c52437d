"""Linear layers, several of them fused into one product where they share their input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.core.interfaces import ModelContext
from nanoflow.core.layers.norm import RMSNorm


class Linear(nn.Module):
    """y = x Wᵀ + b, where W stacks the outputs of one or several checkpoint layers.

    Args:
        context: dtype and device of the parameters.
        in_features: size of x's last dim.
        parts: output size of each checkpoint layer by its name, such as `{"q_proj": Q, "k_proj": K}`, in the order
            in which y holds them.
        bias: whether each of them has one.
    """

    gate = False

    def __init__(self, context: ModelContext, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        place = {"dtype": context.dtype, "device": context.device}
        out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if x_TD.is_cuda:
            from nanoflow.core.kernels.linear import linear

            return linear(x_TD, self.weight, self.bias, gate=self.gate)
        return F.linear(x_TD, self.weight, self.bias)

    def summands(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As `forward`, but on a GPU perhaps [C, T, D] float32 summands of the result, which `RMSNorm.add` takes."""
        if x_TD.is_cuda:
            from nanoflow.core.kernels.linear import linear

            return linear(x_TD, self.weight, self.bias, gate=self.gate, may_split=True)
        return self(x_TD)

    def normed(
        self, norm: RMSNorm, x: torch.Tensor | None, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's result for `norm.add(x, residual)`, and the next residual. Both arguments as there."""
        if residual_TD.is_cuda:
            from nanoflow.core.kernels.linear import normed_linear

            fused = normed_linear(x, residual_TD, norm.weight, norm.eps, self.weight, self.bias, gate=self.gate)
            if fused is not None:
                return fused
        x, residual_TD = norm.add(x, residual_TD)
        return self(x), residual_TD

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """Checkpoint names under `prefix` -> the rows of the fused parameters that they fill."""
        sizes = list(self.parts.values())
        found = {f"{prefix}{part}.weight": w for part, w in zip(self.parts, self.weight.split(sizes), strict=True)}
        if self.bias is not None:
            found |= {f"{prefix}{part}.bias": b for part, b in zip(self.parts, self.bias.split(sizes), strict=True)}
        return found


class GatedLinear(Linear):
    """silu(gate(x)) * up(x) (SwiGLU, Shazeer 2020), with two parts of equal size: gate first, up second."""

    gate = True

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if x_TD.is_cuda:
            return super().forward(x_TD)
        gate, up = super().forward(x_TD).chunk(2, -1)
        return F.silu(gate) * up
