"""How the ranks of one host get to know each other: rank 0 hands each a socket to every other, and a private folder.

Everything goes through sockets without names, so there is no port or path at which anybody else could reach a rank.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.processes import wake_at_hang_up
from nanoflow.core.distributed.rank_group import Driver, Worker

if TYPE_CHECKING:
    import subprocess

    import torch.distributed as dist

STORE = "store"  # the file in the ranks' folder in which GPUs find each other
HELLO = b"."  # goes with the sockets


class Introduced(NamedTuple):
    """What rank 0 keeps of its introduction of the others.

    Attributes:
        peers: sockets to the others, by rank.
        lifelines: sockets whose other ends they have, to be kept open.
        folder: which this user alone can enter.
    """

    peers: dict[int, socket.socket]
    lifelines: list[socket.socket]
    folder: str


def drive(
    sockets: Sequence[socket.socket], pids: Sequence[int | None], processes: list[subprocess.Popen[bytes]]
) -> Driver:
    """Rank 0 of ranks on this host, once it has introduced them to each other.

    Args:
        sockets: to ranks 1, 2, ..., which call `follow`; they become the driver's links.
        pids: their processes; None for one that isn't known.
        processes: the same ones, if this one has started them.
    """
    size = 1 + len(sockets)
    peers, lifelines, folder = _introduce(sockets)
    links = [Connection(each.detach()) for each in sockets]
    for link in links:
        link.send_bytes(folder.encode())
    return Driver(
        file_store(folder, size), links, processes, peers=peers, folder=folder,
        pids={rank: pid for rank, pid in enumerate(pids, 1) if pid is not None},
        lifelines=lifelines,
    )  # fmt: skip


def follow(rank: int, size: int, to_driver: socket.socket) -> tuple[Worker, str]:
    """Any other rank, and the ranks' folder, once rank 0 has introduced it.

    Raises:
        EOFError: rank 0 is gone.
    """
    hello, fds, _, _ = socket.recv_fds(to_driver, len(HELLO), size)
    if hello != HELLO:
        raise EOFError("rank 0 is gone")
    *others, lifeline = [socket.socket(fileno=fd) for fd in fds]
    peers = dict(zip([other for other in range(size) if other != rank], others, strict=True))
    wake_at_hang_up(lifeline)
    link = Connection(to_driver.detach())
    folder = link.recv_bytes().decode()
    store = file_store(folder, size)
    return Worker(ParallelContext(rank, size), store, link, peers=peers, lifeline=lifeline), folder


def file_store(folder: str, size: int) -> dist.Store:
    """Where GPUs of one host find each other: a file that this user alone can read."""
    from torch.distributed import FileStore

    return FileStore(os.path.join(folder, STORE), size)


def _introduce(sockets: Sequence[socket.socket]) -> Introduced:
    size = 1 + len(sockets)
    ends: dict[tuple[int, int], socket.socket] = {}
    for one, other in itertools.combinations(range(size), 2):
        ends[one, other], ends[other, one] = socket.socketpair()
    lifelines = []
    for rank, to_worker in enumerate(sockets, 1):
        ours, theirs = socket.socketpair()
        lifelines.append(ours)
        given = [ends[rank, other] for other in range(size) if other != rank] + [theirs]
        socket.send_fds(to_worker, [HELLO], [each.fileno() for each in given])
        for each in given:
            each.close()
    peers = {other: ends[0, other] for other in range(1, size)}
    return Introduced(peers, lifelines, tempfile.mkdtemp(prefix="nanoflow-"))
