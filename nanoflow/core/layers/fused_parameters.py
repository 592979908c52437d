"""Parameters that stack the weights of several checkpoint layers, so that one GEMM serves them all."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import Shard, Share


class FusedParameters(nn.Module):
    """A weight, and maybe a bias, that stack the outputs of one or several checkpoint layers.

    Args:
        context: dtype and device of the parameters.
        in_features: size of x's last dim, or the share of it that this rank has.
        parts: output size of each checkpoint layer by its name, such as `{"q_proj": Q, "k_proj": K}`, in the order
            in which y holds them, or the share of it that this rank has.
        bias: whether each of them has one.
    """

    def __init__(
        self, context: ModelContext, in_features: int | Share, parts: dict[str, int] | dict[str, Share],
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ops, self.parallel = context.ops, context.parallel
        self.inputs = _share(in_features)
        self.parts = {name: _share(size) for name, size in parts.items()}
        place = {"dtype": context.dtype, "device": context.device}
        out_features = sum(part.length for part in self.parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, self.inputs.length, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        """Checkpoint names under `prefix` -> the rows of the fused parameters that they fill."""
        lengths = [part.length for part in self.parts.values()]
        rows = zip(self.parts.items(), self.weight.split(lengths), strict=True)
        found = {f"{prefix}{name}.weight": self._target(weight, part) for (name, part), weight in rows}
        if self.bias is not None:
            biases = zip(self.parts.items(), self.bias.split(lengths), strict=True)
            found |= {f"{prefix}{name}.bias": self._target(bias, part) for (name, part), bias in biases}
        return found

    def _target(self, view: torch.Tensor, rows: Share) -> torch.Tensor | Shard | None:
        if rows.length < rows.total:
            return Shard(view, 0, rows)
        if view.dim() == 2 and self.inputs.length < self.inputs.total:
            return Shard(view, 1, self.inputs)
        return view


def _share(size: int | Share) -> Share:
    return size if isinstance(size, Share) else Share(0, size, size)
