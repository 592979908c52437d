"""The processes of one engine: rank 0, which schedules and samples, and the others, which compute beside it.

Rank 0 has a socket to each of the others. Down it go messages of any length, one a step, which are bytes and never
pickled; up come replies to those that ask for one, and the reason if a rank fails. The end of a process closes its
sockets, so the others notice it without a timeout, and none is left behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.data.parallel import Group, ParallelContext
from nanoflow.core.distributed.processes import LOOK_SECONDS, StoppedProcesses, hang_ups

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist

    from nanoflow.core.ops import Ops

FAILED = b"!"  # begins a report; its time, a blank and the reason follow
PATIENCE = 2.0  # seconds that reports may need to arrive, and a group to close
LAST_SECONDS = 0.5  # that ranks have to end by themselves, who have nothing to lose


class RankGroup:
    """The ranks of an engine, as one of them sees it; this one may be alone.

    Args:
        parallel: its place, without a group, which `connect` makes.
        store: where the ranks' groups find each other; None for one that is alone.
        local_rank: its number among those of its host; None where there is but one host.
        peers: a socket to each other rank, by its number; None where they are on several hosts.
    """

    def __init__(
        self, parallel: ParallelContext, store: dist.Store | None, local_rank: int | None = None,
        peers: Mapping[int, socket.socket] | None = None,
    ) -> None:  # fmt: skip
        self.parallel = parallel
        self.store = store
        self.peers = peers
        self.is_local = local_rank is None
        self.local_rank = parallel.rank if local_rank is None else local_rank

    def connect(self, device: torch.device, one_shot_kib: int | None, ops: Ops) -> None:
        """Make the group; all ranks have to do it. Arguments as in `make_group`."""
        if self.store is not None:
            self.barrier()  # making it waits for ever for a rank that is gone
            group = self._make_group(device, one_shot_kib, ops)
            self.parallel = ParallelContext(self.parallel.rank, self.parallel.size, group)

    def _make_group(self, device: torch.device, one_shot_kib: int | None, ops: Ops) -> Group:
        if device.type == "cpu" and self.peers is not None:
            from nanoflow.core.distributed.socket_group import SocketGroup

            return SocketGroup(self.parallel.rank, self.peers, self.check)
        from nanoflow.core.distributed.process_group import make_group

        return make_group(
            self.parallel.rank, self.parallel.size, self.store, device, one_shot_kib, ops,
            is_local=self.is_local, watch=self.check,
        )  # fmt: skip

    def minimum(self, number: int) -> int:
        """The least of all ranks' numbers; waits for theirs.

        Raises:
            NanoflowError: another rank failed; says which one and why.
            EOFError: rank 0 is gone.
        """
        return number

    def barrier(self) -> None:
        """Wait until all ranks have come here; raises as `minimum` does."""
        self.minimum(0)

    def check(self) -> None:
        """See whether the others are still there; cheap. Raises as `minimum` does."""

    def raise_if_rank_lost(self) -> None:
        """After an error that may come from the loss of another rank: raise as `minimum` does if so."""

    def close(self) -> None:
        """End the other ranks, if this one is rank 0. May be called again."""


class Driver(RankGroup):
    """Rank 0 of several.

    Args:
        store, local_rank, peers: as in `RankGroup`.
        links: to ranks 1, 2, ...
        processes: theirs, in the same order; none if somebody else started them.
        pids: of other ranks' processes on this host, by rank.
        folder: to be removed at the end.
        lifelines: sockets that are closed at the end, and not before.
    """

    def __init__(
        self, store: dist.Store, links: list[Connection], processes: list[subprocess.Popen[bytes]],
        local_rank: int | None = None, peers: Mapping[int, socket.socket] | None = None,
        pids: Mapping[int, int] | None = None, folder: str | None = None, lifelines: Iterable[socket.socket] = (),
    ) -> None:  # fmt: skip
        super().__init__(ParallelContext(0, 1 + len(links)), store, local_rank, peers)
        self.links, self.processes = links, processes
        self.lost = hang_ups(*links)
        self.stopped = StoppedProcesses(pids or {})
        self.failure: str | None = None
        # At the latest when this process ends.
        self._end = weakref.finalize(self, _end, os.getpid(), links, processes, folder, tuple(lifelines))

    def send(self, message: np.ndarray) -> None:
        """Send bytes, uint8 and contiguous, to all other ranks; raises as `minimum` does."""
        self.check()
        try:
            for link in self.links:
                link.send_bytes(message)  # type: ignore[arg-type]
        except OSError:
            self._fail({})

    def replies(self) -> list[bytes]:
        """What each of the other ranks has sent by `Worker.reply`; waits for it, and raises as `minimum` does."""
        replies = []
        for link in self.links:
            try:
                while not link.poll(LOOK_SECONDS):
                    self.check()
                reply = link.recv_bytes()
            except (EOFError, OSError):
                self._fail({})
            if reply.startswith(FAILED):
                self._fail({link: reply})
            replies.append(reply)
        return replies

    def minimum(self, number: int) -> int:
        numbers = [number, *map(int, self.replies())]
        for link in self.links:
            with suppress(OSError):  # `check` will tell
                link.send_bytes(b"%d" % min(numbers))
        return min(numbers)

    def check(self) -> None:
        if self.failure is not None:
            raise NanoflowError(self.failure)
        if self.lost.poll(0):
            self._fail({})
        if (rank := self.stopped.look()) is not None:
            pid = self.stopped.pids[rank]
            self._raise(rank, f"its process {pid} is stopped, as by SIGSTOP, and did not go on")

    def raise_if_rank_lost(self) -> None:
        if self.failure is None:
            self.lost.poll(1000 * PATIENCE)
        self.check()

    def close(self) -> None:
        if not self._end.alive:
            return
        self.failure = self.failure or "The engine was closed; make a new one."
        for link in self.links:
            link.close()
        # In a thread of its own, for a backend may wait for what its device does, which may wait for ranks to end.
        leave = self.parallel.group.close if self.parallel.group else lambda: None
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        self._end()
        leaving.join(PATIENCE)

    def _fail(self, reports: dict[Connection, bytes]) -> NoReturn:
        """Find out which rank failed first, and why, and raise that."""
        time.sleep(0.1)  # the others fail with it: let them say so
        for link in self.links:
            try:
                while link.poll():
                    reports[link] = link.recv_bytes()
            except (EOFError, OSError):
                if not reports.get(link, b"").startswith(FAILED):
                    reports[link] = FAILED  # ended before it could report: others may have failed after it
        causes = []
        for rank, link in enumerate(self.links, 1):
            if reports.get(link, b"").startswith(FAILED):
                moment, _, reason = reports[link][1:].decode().partition(" ")
                causes.append((float(moment or 0), rank, reason or self._fate(rank)))
        _, rank, reason = min(causes, default=(0, "?", "its connection broke"))
        self._raise(rank, reason)

    def _raise(self, rank: int | str, reason: str) -> NoReturn:
        self.failure = f"Rank {rank} of {self.parallel.size} failed, and the engine with it: {reason.rstrip('.')}."
        raise NanoflowError(self.failure)

    def _fate(self, rank: int) -> str:
        if not self.processes:
            return "its process is gone"
        try:
            code = self.processes[rank - 1].wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}"


class Worker(RankGroup):
    """Any other rank.

    Args:
        parallel, store, local_rank, peers: as in `RankGroup`.
        link: to rank 0.
        lifeline: a socket that rank 0 closes when it ends.
    """

    def __init__(
        self, parallel: ParallelContext, store: dist.Store, link: Connection, local_rank: int | None = None,
        peers: Mapping[int, socket.socket] | None = None, lifeline: socket.socket | None = None,
    ) -> None:  # fmt: skip
        super().__init__(parallel, store, local_rank, peers)
        self.link, self.lifeline = link, lifeline
        self.lost = hang_ups(link)

    def minimum(self, number: int) -> int:
        self.reply(b"%d" % number)
        return int(self.receive())

    def reply(self, reply: bytes) -> None:
        """Send rank 0 what it waits for in `Driver.replies`; doesn't begin with `FAILED`."""
        self.link.send_bytes(reply)

    def receive(self) -> bytes:
        """Rank 0's next message.

        Raises:
            EOFError: there are no more.
        """
        try:
            return self.link.recv_bytes()
        except ConnectionResetError as error:
            raise EOFError("rank 0 is gone") from error

    def check(self) -> None:
        if self.lost.poll(0):
            raise EOFError("rank 0 is gone")

    def report(self, error: BaseException) -> bool:
        """Tell rank 0 why this one ends, and close the link; False if rank 0 is gone, which will be why."""
        reason = str(error) if isinstance(error, NanoflowError) else f"{type(error).__name__}: {error}"
        try:
            self.link.send_bytes(FAILED + f"{time.time()} {' '.join(reason.split())}".encode())
        except OSError:
            return False
        finally:
            self.link.close()
        return True


def _end(
    owner: int, links: list[Connection], processes: list[subprocess.Popen[bytes]], folder: str | None,
    lifelines: Iterable[socket.socket],
) -> None:  # fmt: skip
    """Let the processes end, which they do when they hear no more, and end those that can't hear."""
    if os.getpid() != owner:  # a fork of rank 0 has no say
        return
    for link in (*links, *lifelines):
        link.close()
    deadline = time.monotonic() + LAST_SECONDS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
