"""One rank of several on one GPU, without the others: what its part of the model costs by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest import mock

import torch

from nanoflow.core.config import Config
from nanoflow.core.parallel import ParallelContext
from nanoflow.core.process_group import ONE_SHOT_KIB
from nanoflow.core.rehearsal import Echo
from nanoflow.core.team import Team


@dataclass(frozen=True)
class Silent(Echo):
    """Of a rank that takes its own part for the sum, and itself for all others. Its tokens mean nothing.

    Attributes:
        most_bytes: of sums that are left to norms, as in `OneShotGroup`; for GPUs.
    """

    most_bytes: int

    def sums_in_norm(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        return num_rows * size * dtype.itemsize <= self.most_bytes

    def sum_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from nanoflow.core.kernels.norm import add_rms_norm

        return add_rms_norm(x, residual_TD, weight_D, eps)


def one_of(size: int) -> AbstractContextManager[object]:
    """Within it, engines of one rank are built as rank 0 of so many."""

    def form_team(config: Config) -> Team:
        kib = config.engine.one_shot_kib
        group = Silent(size, 1024 * (ONE_SHOT_KIB if kib is None else kib))
        # With a local rank, as under torchrun: this host needs no GPUs for the others.
        return Team(ParallelContext(0, size, group), None, local_rank=0)

    return mock.patch("nanoflow.core.build.form_team", form_team)
