"""How many threads are best for the steps on a CPU."""

from __future__ import annotations

import torch

from nanoflow.core.distributed.cores import busy_cores, usable_cores

WEIGHTS_PER_THREAD = 2**20  # of a layer; with fewer, threads wait for each other longer than they compute


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
