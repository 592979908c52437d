"""Ranks agree on how they exchange tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.distributed import process_group
from nanoflow.core.distributed.process_group import ProcessGroup, Renumbered, exchanged, make_group
from nanoflow.core.ops import Ops


def test_all_ranks_know_of_a_problem_of_one() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: exchanged("no peers" if rank == 1 else "", rank, 3, store), range(3)))
    assert found == [["", "no peers", ""]] * 3


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 1), (2, 1, 3), (7,), (4, 0)])
def test_what_was_gathered_is_contiguous(shape: tuple[int, ...]) -> None:
    """Kernels rely on it."""
    wholes = torch.arange(3 * torch.Size(shape).numel()).view(*shape[:-1], 3 * shape[-1])
    store = HashStore()

    def gather(rank: int) -> torch.Tensor:
        group = make_group(rank, 3, store, torch.device("cpu"), None, Ops(), is_local=True)
        return group.all_gather(wholes.chunk(3, -1)[rank])

    with ThreadPoolExecutor(3) as pool:
        for gathered in pool.map(gather, range(3)):
            assert torch.equal(gathered, wholes)
            assert gathered.is_contiguous()


class NCCL:
    Options = SimpleNamespace

    def __init__(self, *args: Any) -> None:
        pass


class OneShot(ProcessGroup):
    """It can't be had by rank 1."""

    unregistered: ClassVar[list[OneShot]] = []

    def __init__(self, backend: Any, rank: int, size: int, *args: Any) -> None:
        super().__init__(backend, size)
        if rank == 1:
            raise RuntimeError("no peer access.\nmore")

    def unregister(self) -> None:
        self.unregistered.append(self)


def test_where_one_rank_shares_no_memory_all_take_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NCCL, raising=False)
    monkeypatch.setattr(process_group, "OneShotGroup", OneShot)
    monkeypatch.setattr(OneShot, "unregistered", [])
    monkeypatch.setattr(ProcessGroup, "open", lambda self, device: None)
    device = torch.device("cuda", 0)

    def groups(one_shot_kib: int | None) -> list[ProcessGroup]:
        store = HashStore()
        with ThreadPoolExecutor(2) as pool:
            return list(
                pool.map(lambda rank: make_group(rank, 2, store, device, one_shot_kib, Ops(), is_local=True), range(2))
            )

    with pytest.warns(UserWarning, match=r"can't write to each other's memory \(no peer access\), so NCCL") as told:
        assert [type(group) for group in groups(None)] == [ProcessGroup] * 2
    assert len(told) == 1
    assert len(OneShot.unregistered) == 1, "that of rank 0, which had one"
    with pytest.raises(ConfigError, match=r"\(no peer access\); set it to 0"):
        groups(64)


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
