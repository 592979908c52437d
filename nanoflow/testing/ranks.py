"""Ranks as threads of one process: a context for each, whose group adds and joins tensors in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
import torch.nn.functional as F

from nanoflow.core.data.parallel import Group, ParallelContext

T = TypeVar("T")


class Threads(Group):
    """What one rank sees of them.

    Args:
        rank: this one.
        parts: a place for each rank's tensor, shared by all.
        barrier: of all ranks.
        in_norm: whether sums that a norm follows are left to `allreduce_add_norm`.
    """

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: Barrier, *, in_norm: bool) -> None:
        self.rank, self.parts, self.barrier, self.in_norm = rank, parts, barrier, in_norm

    def _exchange(self, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self.parts[self.rank] = x
        self.barrier.wait(20)
        result = combine(self.parts)
        self.barrier.wait(20)
        return result

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.stack(parts).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.cat(parts, -1))

    def fuses_norm(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        return self.in_norm

    def allreduce_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part_TD = x if x.dim() == 2 else x.sum(0)
        residual_TD = self.all_reduce(part_TD.to(residual_TD.dtype)) + residual_TD
        return F.rms_norm(residual_TD, weight_D.shape, weight_D, eps), residual_TD

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._exchange(x, lambda parts: parts[0].clone()))


def on_ranks(size: int, work: Callable[[ParallelContext], T], *, in_norm: bool = False) -> list[T]:
    """What `work` gives on each of so many ranks, which run at a time; `in_norm` as in `Threads`."""
    parts, barrier = [torch.empty(0)] * size, Barrier(size)
    contexts = [ParallelContext(rank, size, Threads(rank, parts, barrier, in_norm=in_norm)) for rank in range(size)]

    def guarded(context: ParallelContext) -> T:
        try:
            with torch.inference_mode():
                return work(context)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, contexts))
