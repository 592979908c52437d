"""Token embedding, which is also the output head where the two are tied; its vocabulary is split over ranks."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import RankPartials, Shard


class Embedding(nn.Module):
    """A table of V vectors of size D: `forward` looks them up, `logits` multiplies with them.

    Raises:
        ConfigError: the V vectors can't be split evenly over the ranks.
    """

    def __init__(self, context: ModelContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.ops, self.parallel = context.ops, context.parallel
        self.share = self.parallel.share(vocab_size, "tokens of the vocabulary")
        weight = torch.empty(self.share.length, hidden_size, dtype=context.dtype, device=context.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]"""
        return self.parallel.all_reduce(self._part(input_ids_T))

    def partials(self, input_ids_T: torch.Tensor) -> tuple[RankPartials | None, torch.Tensor]:
        """As `forward`, or ranks' parts of it and the residual, 0, that they are added to; both for `RMSNorm.add`."""
        if self.parallel.size == 1:
            return None, self._part(input_ids_T)
        x = self.parallel.partials(self._part(input_ids_T), self.weight.dtype)
        return (x, torch.zeros_like(x.part)) if isinstance(x, RankPartials) else (None, x)

    def _part(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """What this rank has of each vector: all or nothing."""
        return self.ops.embedding(input_ids_T, self.weight, None if self.parallel.size == 1 else self.share.start)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V / ranks], of this rank's part of the vocabulary."""
        return self.ops.linear(hidden_SD, self.weight)

    def weights(self, name: str) -> dict[str, torch.Tensor | Shard | None]:
        """The checkpoint tensor `name` fills the table."""
        return {name: self.weight if self.parallel.size == 1 else Shard(self.weight, 0, self.share)}
