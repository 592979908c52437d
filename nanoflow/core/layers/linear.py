"""Linear layers, several of them fused into one GEMM where they share their input, whole or split over ranks."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard, Share
from nanoflow.core.layers.norm import RMSNorm


class Linear(nn.Module):
    """y = x Wᵀ + b, where W stacks the outputs of one or several checkpoint layers. Every rank has all of it.

    Args:
        context: dtype and device of the parameters.
        in_features: size of x's last dim, or the share of it that this rank has.
        parts: output size of each checkpoint layer by its name, such as `{"q_proj": Q, "k_proj": K}`, in the order
            in which y holds them, or the share of it that this rank has.
        bias: whether each of them has one.
    """

    gate = False

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
            if total is not None:
                return None, total
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


class ColumnParallelLinear(Linear):
    """A `Linear` whose outputs are split: each rank has as large a share of every part.

    Raises:
        ConfigError: a part can't be split evenly.
    """

    def __init__(self, context: ModelContext, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        shares = {name: context.parallel.share(size, f"outputs of {name}") for name, size in parts.items()}
        super().__init__(context, in_features, shares, bias)


class GatedLinear(ColumnParallelLinear):
    """silu(gate(x)) * up(x) (SwiGLU, Shazeer 2020), with two parts of equal size: gate first, up second."""

    gate = True


class QKVLinear(Linear):
    """Queries, keys and values, split by heads. Ranks beyond the number of KV heads have one that others have too.

    Args:
        context: as in `Linear`.
        in_features: as in `Linear`.
        num_heads: N, of all ranks together.
        num_kv_heads: K, of all ranks together.
        head_dim: H.
        bias: as in `Linear`.
        names: of the three checkpoint layers.

    Raises:
        ConfigError: the heads can't be split evenly.
    """

    def __init__(
        self, context: ModelContext, in_features: int, num_heads: int, num_kv_heads: int, head_dim: int,
        bias: bool = False, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    ) -> None:  # fmt: skip
        heads = context.parallel.share(num_heads, "query heads").times(head_dim)
        kv_heads = context.parallel.share_kv_heads(num_kv_heads).times(head_dim)
        super().__init__(context, in_features, dict(zip(names, (heads, kv_heads, kv_heads), strict=True)), bias)


class RowParallelLinear(Linear):
    """A `Linear` whose inputs are split, as a layer with split outputs leaves them; the ranks' results are added up.

    Raises:
        ConfigError: the inputs can't be split evenly.
    """

    def __init__(self, context: ModelContext, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        inputs = context.parallel.share(in_features, f"inputs of {' and '.join(parts)}")
        super().__init__(context, inputs, parts, bias and context.parallel.rank == 0)  # it is added once
        self.biases = [f"{name}.bias" for name in parts] if bias else []

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.parallel.all_reduce(self._gemm(x_TD))

    def partials(self, x_TD: torch.Tensor) -> torch.Tensor | RankPartials:
        in_norm = self.parallel.size == 1 or self.parallel.fuses_norm(len(x_TD), len(self.weight), x_TD.dtype)
        return self.parallel.partials(self._gemm(x_TD, may_split=in_norm), x_TD.dtype)

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        return {prefix + name: None for name in self.biases} | super().weights(prefix)


def _share(size: int | Share) -> Share:
    return size if isinstance(size, Share) else Share(0, size, size)
