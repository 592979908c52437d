"""Ranks agree on how they exchange tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from nanoflow.core.process_group import exchanged


def test_all_ranks_know_of_a_problem_of_one() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: exchanged("no peers" if rank == 1 else "", rank, 3, store), range(3)))
    assert found == [["", "no peers", ""]] * 3
