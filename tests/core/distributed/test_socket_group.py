"""Ranks on one host's CPU exchange tensors through sockets: right sums, with equal bits, of any size and dtype."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import pytest
import torch

from nanoflow.core.data.parallel import RankLost
from nanoflow.core.distributed import socket_group
from nanoflow.core.distributed.process_group import GlooGroup, ProcessGroup, environment, nccl_environment
from nanoflow.core.distributed.socket_group import SocketGroup


def groups_of(size: int, watch: Callable[[], None] = lambda: None) -> list[SocketGroup]:
    peers: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for one, other in combinations(range(size), 2):
        peers[one][other], peers[other][one] = socket.socketpair()
    return [SocketGroup(rank, peers[rank], watch) for rank in range(size)]


def on_all(groups: list[SocketGroup], work: Callable[[SocketGroup], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, groups))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (0, 4), (7, 1), (300, 512), (3, 7001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_sums_and_what_is_gathered(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    parts = [(8 * torch.randn(shape)).to(dtype) for _ in range(size)]
    groups = groups_of(size)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    with torch.inference_mode():
        sums = on_all(groups, lambda group: group.all_reduce(parts[group.rank].clone()))
        wholes = on_all(groups, lambda group: group.all_gather(parts[group.rank]))
        told = [part.clone() for part in parts]
        on_all(groups, lambda group: group.broadcast(told[group.rank]))
    for rank in range(size):
        assert torch.equal(sums[rank], expected)
        assert torch.equal(wholes[rank], torch.cat(parts, -1))
        assert wholes[rank].is_contiguous()
        assert torch.equal(told[rank], parts[0])
    for group in groups:
        group.close()


def test_sums_in_and_out_of_inference_mode() -> None:
    groups = groups_of(2)

    def add(group: SocketGroup) -> list[torch.Tensor]:
        with torch.inference_mode():
            first = group.all_reduce(torch.ones(4))
        return [first, group.all_reduce(torch.ones(3))]

    for first, second in on_all(groups, add):
        assert torch.equal(first, torch.full((4,), 2.0))
        assert torch.equal(second, torch.full((3,), 2.0))
    for group in groups:
        group.close()


def test_a_rank_that_is_gone_is_noticed() -> None:
    groups = groups_of(2)
    groups[1].close()
    with pytest.raises(RankLost, match="rank 1 is gone"):
        groups[0].all_reduce(torch.ones(3))
    groups[0].close()


def test_whoever_waits_looks_at_the_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(socket_group, "SLICE", 0.01)
    monkeypatch.setattr(socket_group, "SILENT", 0.05)
    looks: list[float] = []

    def watch() -> None:
        looks.append(time.monotonic())
        if len(looks) == 20:
            raise InterruptedError

    groups = groups_of(3, watch)
    with pytest.raises(InterruptedError):
        groups[0].all_reduce(torch.ones(3))
    assert [record.getMessage() for record in caplog.records] == ["rank 1, 2 of 3 has not answered for 0 seconds"]
    for group in groups:
        group.close()


class Endless:
    """A sum of gloo's that isn't done."""

    def is_completed(self) -> bool:
        return False


def test_a_sum_over_several_hosts_can_be_interrupted() -> None:
    def watch() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        GlooGroup(None, 2, watch)._wait(Endless())


def test_only_groups_over_gloo_wait() -> None:
    ProcessGroup(None, 2)._wait(None)


def test_variables_are_set_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """None that the user has set, and none is left behind."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    before = dict(os.environ)
    with environment(nccl_environment(is_local=True)):
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        assert (os.environ["NCCL_NVLS_ENABLE"], os.environ["NCCL_SOCKET_IFNAME"]) == ("1", "eth7")
    assert dict(os.environ) == before
