"""Token embedding, which is also the output head where the two are tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanoflow.core.interfaces import ModelContext


class Embedding(nn.Module):
    """A table of V vectors of size D: `forward` looks them up, `logits` multiplies with all of them."""

    def __init__(self, context: ModelContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=context.dtype, device=context.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]"""
        return F.embedding(input_ids_T, self.weight)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        if hidden_SD.is_cuda:
            from nanoflow.core.kernels.linear import linear

            return linear(hidden_SD, self.weight)
        return F.linear(hidden_SD, self.weight)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The checkpoint tensor `name` fills the table."""
        return {name: self.weight}
