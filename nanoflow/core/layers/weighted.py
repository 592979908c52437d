"""Which checkpoint tensors a module is made of, by the names of its children."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.data.parallel import Shard
from nanoflow.core.layers.fused_parameters import FusedParameters


class Weighted(nn.Module):
    """A module whose checkpoint tensors are those of its children, which stand there under the same names."""

    def weights(self, prefix: str) -> dict[str, torch.Tensor | Shard | None]:
        """Checkpoint names under `prefix` -> what they fill. Fused layers have names of their own for their parts."""
        found: dict[str, torch.Tensor | Shard | None] = {}
        for name, child in self.named_children():
            found |= child.weights(prefix if isinstance(child, FusedParameters) else f"{prefix}{name}.")
        return found
