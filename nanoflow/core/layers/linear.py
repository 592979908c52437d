"""Linear layers, several of them fused into one GEMM where they share their input."""

from __future__ import annotations

import torch

from nanoflow.core.data.parallel import RankPartials
from nanoflow.core.layers.fused_parameters import FusedParameters
from nanoflow.core.layers.norm import RMSNorm


class Linear(FusedParameters):
    """y = x Wᵀ + b, where W stacks the outputs of one or several checkpoint layers. Every rank has all of it."""

    gate = False

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._gemm(x_TD)

    def partials(self, x_TD: torch.Tensor) -> torch.Tensor | RankPartials:
        """As `forward`, or something that `RMSNorm.add` adds up to it: [C, T, D] in float32, or ranks' parts."""
        return self._gemm(x_TD, may_split=True)

    def _gemm(self, x_TD: torch.Tensor, *, may_split: bool = False) -> torch.Tensor:
        """This rank's part of the result; with `may_split` it may be split-K partials."""
        return self.ops.linear(x_TD, self.weight, self.bias, gate=self.gate, may_split=may_split)

    def linear_residual(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor | RankPartials | None, torch.Tensor]:
        """The result and the residual that it is yet to be added to, as `RMSNorm.add` takes them: None if it has been.

        May overwrite the residual.
        """
        if self.parallel.size == 1:
            total = self.ops.linear_residual(x_TD, self.weight, self.bias, residual_TD)
            return (self._gemm(x_TD, may_split=True), residual_TD) if total is None else (None, total)
        return self.partials(x_TD), residual_TD

    def norm_linear(
        self, norm: RMSNorm, x: torch.Tensor | RankPartials | None, residual_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's result for `norm.add(x, residual)`, and the next residual. Both arguments as there."""
        if x is None and type(norm) is RMSNorm:
            y = self.ops.norm_linear(residual_TD, norm.weight, norm.eps, self.weight, self.bias, gate=self.gate)
            if y is not None:
                return y, residual_TD
        x, residual_TD = norm.add(x, residual_TD)
        return self(x), residual_TD
