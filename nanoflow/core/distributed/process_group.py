"""The group of ranks over torch.distributed: NCCL between GPUs, gloo between CPUs.

It uses backends as objects of its own and not PyTorch's default group, of which there is one a process: two engines in
one process don't know of each other.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.data.parallel import Group, RankLost
from nanoflow.core.distributed.fused_allreduce_norm import FusedAllReduceNorm
from nanoflow.core.ops import Ops
from nanoflow.core.ops.allreduce import EMPTY

LONGEST = timedelta(minutes=10)  # that ranks may be apart, when one of them compiles kernels
SOON = timedelta(seconds=60)  # ... and when they have just met
SHORTEST_PAUSE, LONGEST_PAUSE = 2e-5, 2e-3  # seconds between two looks at a sum of gloo's
ONE_SHOT_KIB = 8192  # by default; up to there sums fused with norms were faster than NCCL's on H100s


def make_group(
    rank: int, size: int, store: dist.Store, device: torch.device, one_shot_kib: int | None, ops: Ops, *,
    is_local: bool, watch: Callable[[], None] = lambda: None,
) -> ProcessGroup:  # fmt: skip
    """Connect to the other ranks, which call this too.

    Args:
        rank, size: this one's place.
        store: where ranks find each other; nobody else may use it.
        device: of the tensors.
        one_shot_kib: as in the engine's options.
        ops: to sum with.
        is_local: whether all ranks are on this host.
        watch: called while waiting on a CPU; raises if the wait is in vain.

    Raises:
        ConfigError: `one_shot_kib` asks for symmetric memory, and there is none here.
    """
    if device.type == "cpu":
        options = dist.ProcessGroupGloo._Options()
        gloo = dist.ProcessGroupGloo
        options._devices = [gloo.create_device(hostname="127.0.0.1") if is_local else gloo.create_default_device()]
        options._timeout = LONGEST
        return GlooGroup(gloo(store, rank, size, options), size, watch)
    with environment(nccl_environment(is_local=is_local)):
        group = _nccl_group(rank, size, store, device, one_shot_kib, ops, is_local=is_local)
        group.open(device)
    return group


def nccl_environment(*, is_local: bool) -> dict[str, str]:
    """Environment variables that NCCL and PyTorch read when a group is made."""
    # Both would use NVLink multicast where the hardware has it, which not every host lets its users do.
    variables = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    # A lost rank is noticed by its socket. NCCL's watchdog would end this process instead of raising an error.
    variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    return variables | ({"NCCL_SOCKET_IFNAME": "lo"} if is_local else {})  # no other host can reach the ranks there


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Have these environment variables for a while, except those that are set already."""
    ours = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _nccl_group(
    rank: int, size: int, store: dist.Store, device: torch.device, one_shot_kib: int | None, ops: Ops, *,
    is_local: bool,
) -> ProcessGroup:  # fmt: skip
    """`make_group` for GPUs."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = LONGEST
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
    if one_shot_kib == 0 or (one_shot_kib is None and not is_local):
        return ProcessGroup(nccl, size)
    group, problem = None, ""
    place = dist.PrefixStore("one_shot", store)
    try:
        group = OneShotGroup(nccl, rank, size, place, device, one_shot_bytes(one_shot_kib), ops)
    except RuntimeError as error:
        problem = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    reason = next(filter(None, exchanged(problem, rank, size, dist.PrefixStore("problem", store))), None)
    if reason is None:
        return group
    if group is not None:
        group.unregister()
    if one_shot_kib is not None:
        raise ConfigError(f"engine.one_shot_kib can't be used with these GPUs ({reason}); set it to 0.")
    if rank == 0:
        told = f"These GPUs can't write to each other's memory ({reason}), so NCCL makes all sums, which takes longer."
        warnings.warn(told, stacklevel=4)
    return ProcessGroup(nccl, size)


def one_shot_bytes(one_shot_kib: int | None) -> int:
    """Bytes up to which sums are left to norms: what the engine's option says, or its default."""
    return 1024 * (ONE_SHOT_KIB if one_shot_kib is None else one_shot_kib)


def exchanged(text: str, rank: int, size: int, store: dist.Store) -> list[str]:
    """The texts of all ranks, which call this too, in their order."""
    store.set(str(rank), text)
    return [store.get(str(other)).decode() for other in range(size)]


class ProcessGroup(Group):
    """Ranks that exchange tensors by one of PyTorch's backends, in the order of the current stream.

    Args:
        backend: gloo's or NCCL's.
        size: number of ranks.
    """

    def __init__(self, backend: Any, size: int) -> None:
        self.backend, self.size = backend, size
        self.reduce_options, self.gather_options = AllreduceOptions(), AllgatherOptions()
        self.broadcast_options = BroadcastOptions()
        for options in (self.reduce_options, self.gather_options, self.broadcast_options):
            options.asyncOp = False  # on the current stream, not on one of the backend's own

    def open(self, device: torch.device) -> None:
        """Connect by a first sum, which else would be whichever comes first, at any time."""
        self.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._wait(self.backend.allreduce([x], self.reduce_options))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.size * x.shape[-1])
        parts = x.new_empty(self.size * x.numel())
        self._wait(self.backend._allgather_base(parts, x.flatten(), self.gather_options))
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2).contiguous()  # a view if x's last dim is 1

    def broadcast(self, x: torch.Tensor) -> None:
        self._wait(self.backend.broadcast([x], self.broadcast_options))

    def _wait(self, work: Any) -> None:
        """In the order of the current stream."""
        if work is not None:
            work.wait()

    def close(self) -> None:
        self.backend.abort()
        self.backend = None  # the end of its threads is waited for


class GlooGroup(ProcessGroup):
    """Ranks that exchange tensors of a CPU, on several hosts. Whoever waits can be interrupted.

    Args:
        backend, size: as in `ProcessGroup`.
        watch: called while waiting; raises if the wait is in vain.
    """

    def __init__(self, backend: Any, size: int, watch: Callable[[], None]) -> None:
        super().__init__(backend, size)
        self.watch = watch

    def _wait(self, work: Any) -> None:
        """Until it is done, in slices.

        Raises:
            RankLost: a rank closed its connection.
        """
        pause = SHORTEST_PAUSE
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if pause == LONGEST_PAUSE:
                self.watch()
        try:
            work.wait()
        except RuntimeError as error:
            raise RankLost(str(error)) from error


class Renumbered(dist.Store):
    """A store for one group's symmetric memory, for which PyTorch numbers exchanges through the whole process.

    Ranks whose processes have had different many, in engines before, would wait for each other's keys for ever. So an
    exchange gets the number that it has in this store. PyTorch calls it from C++.

    Args:
        store: what to keep its keys "NAME/NUMBER/RANK" in.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store = store
        self.numbers: dict[str, int] = {}

    def set(self, key: str, value: bytes) -> None:
        self.store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self.store.get(self._key(key))

    def wait(self, keys: list[str], timeout: timedelta = SOON) -> None:
        self.store.wait([self._key(key) for key in keys], timeout)

    def _key(self, key: str) -> str:
        exchange, _, rank = key.rpartition("/")
        return f"{self.numbers.setdefault(exchange, len(self.numbers))}/{rank}"


class OneShotGroup(FusedAllReduceNorm, ProcessGroup):
    """NCCL, but small sums that a norm follows are made with it in one kernel (`Ops.allreduce_add_rms_norm`).

    Ranks write to each other's memory, which is PyTorch's symmetric memory: for small sums the one-shot all-reduce of
    FasterTransformer and TensorRT-LLM. Where latency counts, as in decode steps, one exchange is faster than the
    several of a ring.

    Args:
        backend, size: as in `ProcessGroup`.
        rank: this one.
        store: for these ranks and this purpose alone.
        device: this rank's GPU, on one host with the others.
        most_bytes: of a sum that is made so; larger ones are left to NCCL.
        ops: to sum with.
    """

    def __init__(
        self, backend: Any, rank: int, size: int, store: dist.Store, device: torch.device, most_bytes: int, ops: Ops
    ) -> None:  # fmt: skip
        super().__init__(backend, size)
        self.name = store.get("name").decode() if rank else f"nanoflow-{os.getpid()}-{id(self)}"
        if rank == 0:
            store.set("name", self.name)
        # Symmetric memory knows groups by their names, in PyTorch's registry. Which of a group's stores ranks find each
        # other by depends on PyTorch's version.
        self.store = Renumbered(dist.PrefixStore("memory", store))  # kept, since its methods are Python's
        group = dist.ProcessGroup(self.store, rank, size)
        group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, backend)
        group._set_group_name(self.name)
        c10d._register_process_group(self.name, group)
        self.unregister = partial(c10d._unregister_process_group, self.name)
        try:
            self._open(rank, size, device, most_bytes, ops)
        except RuntimeError:
            self.unregister()
            raise

    def _open(self, rank: int, size: int, device: torch.device, most_bytes: int, ops: Ops) -> None:
        """Make the inbox, and learn where those of the others are."""
        from torch.distributed import _symmetric_memory as symmetric

        c10d._SymmetricMemory.set_group_info(self.name, rank, size, self.store)
        shape = self.shape_of_inbox(size, most_bytes)
        self.inbox = symmetric.empty(*shape, dtype=torch.int32, device=device).fill_(EMPTY)
        torch.cuda.synchronize(device)  # before others get to know of it and write there
        self.handle = symmetric.rendezvous(self.inbox, self.name)
        offset = self.inbox.data_ptr() - self.handle.buffer_ptrs[rank]  # of the tensor in its allocation
        addresses = [pointer + offset for pointer in self.handle.buffer_ptrs]
        self.use(addresses, rank, most_bytes, device, ops)
        self.aside = torch.cuda.Stream(device)
        self.yes = torch.ones(1, dtype=torch.int32, pin_memory=True)

    def close(self) -> None:
        # Kernels may wait for a rank that is gone, and whoever frees memory for them. A copy can run beside them.
        with torch.cuda.stream(self.aside):
            self.left.copy_(self.yes, non_blocking=True)
        self.unregister()
        super().close()
