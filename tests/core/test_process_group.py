"""Ranks agree on how they exchange tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore

from nanoflow.core.process_group import Renumbered, exchanged


def test_all_ranks_know_of_a_problem_of_one() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: exchanged("no peers" if rank == 1 else "", rank, 3, store), range(3)))
    assert found == [["", "no peers", ""]] * 3


def test_exchanges_are_numbered_by_the_store() -> None:
    """Ranks meet, though PyTorch's counters in their processes differ; it calls the store from C++."""
    shared = HashStore()
    ranks = [Renumbered(shared) for _ in range(2)]
    for exchange in range(3):
        keys = [f"CUDASymmetricMemory/{exchange + before}" for before in (0, 40)]
        for rank in range(2):
            PrefixStore(keys[rank], ranks[rank]).set(str(rank), f"{exchange} {rank}")
        for rank in range(2):
            other = 1 - rank
            PrefixStore(keys[rank], ranks[rank]).wait([str(other)], timedelta(seconds=5))
            assert PrefixStore(keys[rank], ranks[rank]).get(str(other)) == f"{exchange} {other}".encode()


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renumbered.wait, "__defaults__", (timedelta(seconds=0.1),))
    ranks = Renumbered(HashStore())
    with pytest.raises(RuntimeError, match="timeout"):
        PrefixStore("CUDASymmetricMemory/0", ranks).wait(["1"])
