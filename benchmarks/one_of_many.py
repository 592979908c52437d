"""One rank of several on one GPU, without the others: what its part of the model costs by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch

from nanoflow.core.config.engine_config import Config
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.process_group import one_shot_bytes
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.warmup.trace_kernels import EchoGroup


class Alone(EchoGroup):
    """Sums in norms take this rank's part, too, instead of waiting for others'."""

    def allreduce_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ops.add_rms_norm(x, residual_TD, weight_D, eps)


def one_of(size: int) -> AbstractContextManager[object]:
    """Within it, engines of one rank are built as rank 0 of so many."""

    def form_rank_group(config: Config) -> RankGroup:
        device = torch.device("cuda")
        group = Alone(size, one_shot_bytes(config.engine.one_shot_kib), device, select_ops(device))
        # With a local rank, as under torchrun: this host needs no GPUs for the others.
        return RankGroup(ParallelContext(0, size, group), None, local_rank=0)

    return mock.patch("nanoflow.core.engine.build.form_rank_group", form_rank_group)
