"""How many threads PyTorch computes a step with on a CPU, and that a caller's own number is left alone."""

from __future__ import annotations

from types import TracebackType

import torch

from nanoflow.core.distributed.cores import busy_cores, usable_cores

WEIGHTS_PER_THREAD = 2**20  # of a layer; with fewer, threads wait for each other longer than they compute


class Threads:
    """In a `with` block PyTorch computes with so many threads; behind it, with as many as before. It takes 0.2 µs.

    Args:
        number: None leaves the number alone.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.before = number

    def __enter__(self) -> None:
        if self.number is not None:
            self.before = torch.get_num_threads()
            if self.before != self.number:
                torch.set_num_threads(self.number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.before is not None and self.before != self.number:
            torch.set_num_threads(self.before)


def pick_num_threads(wanted: int | None, layer_weights: int, num_ranks: int = 1) -> int:
    """Threads for the steps of one rank.

    As many as there are cores that nobody is using, shared by the ranks: threads that wait for one that has no core
    spin meanwhile, and steps take many times as long. Never more than PyTorch would take, which heeds OMP_NUM_THREADS.

    Args:
        wanted: as told; None to choose.
        layer_weights: numbers in one of the model's layers, of this rank.
        num_ranks: on this host.
    """
    if wanted is not None:
        return wanted
    most = min(torch.get_num_threads(), usable_cores() // num_ranks, -(-layer_weights // WEIGHTS_PER_THREAD))
    if most <= 1:
        return 1
    idle = round(usable_cores() - busy_cores())
    return max(1, min(most, idle // num_ranks))
