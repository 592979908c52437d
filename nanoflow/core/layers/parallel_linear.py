"""Linear layers that are split over ranks, by outputs, heads or inputs; with one rank each of them is whole."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard
from nanoflow.core.layers.linear import Linear


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
