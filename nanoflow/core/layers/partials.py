"""Residual addition of what layers leave to be added up, for norms that don't do it themselves."""

from __future__ import annotations

import torch

from nanoflow.core.data.parallel import RankPartials


def add_partials(x: torch.Tensor | RankPartials | None, residual: torch.Tensor) -> torch.Tensor:
    """Residual addition, x + residual [T, D], for norms of other kinds: x is all that `RMSNorm.add` takes."""
    if x is None:
        return residual
    if isinstance(x, RankPartials):
        part = x.part if x.part.dim() == 2 else x.part.sum(0)
        return x.group.all_reduce(part.to(residual.dtype).contiguous()) + residual
    return (x if x.dim() == 2 else x.sum(0).to(residual.dtype)) + residual
