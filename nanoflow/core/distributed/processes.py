"""What the system tells of the processes of other ranks: whose socket is closed, and which of them is stopped."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

LOOK_SECONDS = 0.5  # between two looks at the states of processes
WARN_SECONDS = 1.0  # that a process is stopped before that is told
STOPPED_SECONDS = 10.0  # ... and before it is taken for lost
SET_SIGNAL = 10  # fcntl's F_SETSIG on Linux
logger = logging.getLogger("nanoflow")


def hang_ups(*links: Connection) -> select.poll:
    """Polls for those links whose other ends are closed, whatever is still to be read."""
    poll = select.poll()
    for link in links:
        poll.register(link.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
    return poll


def is_stopped(pid: int) -> bool:
    """Whether a process of this host is stopped, as by SIGSTOP; False where the system doesn't tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def peer_pid(link: socket.socket) -> int | None:
    """The process at the other end of a socket of this host; None where the system doesn't tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    return struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def wake_at_hang_up(lifeline: socket.socket) -> None:
    """Have the system continue this process, if it is stopped, when the other end of the socket is closed.

    Nothing may be sent through the socket. Without effect on systems other than Linux.
    """
    try:
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, SET_SIGNAL, int(signal.SIGCONT))
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):
        return


class StoppedProcesses:
    """Tells which ranks' processes have been stopped for long.

    Args:
        pids: processes of this host, by rank.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self.pids = dict(pids)
        self.since: dict[int, float] = {}
        self.told: set[int] = set()
        self.looked = 0.0

    def look(self) -> int | None:
        """A rank that has been stopped for `STOPPED_SECONDS`. To be called again and again; mostly does nothing.

        Logs a warning about one that has been stopped for a while.
        """
        now = time.monotonic()
        if now < self.looked + LOOK_SECONDS:
            return None
        if now > self.looked + STOPPED_SECONDS:  # nobody asked in between
            self.since.clear()
        self.looked = now
        for rank, pid in self.pids.items():
            if not is_stopped(pid):
                self.since.pop(rank, None)
                self.told.discard(rank)
                continue
            seconds = now - self.since.setdefault(rank, now)
            if seconds >= STOPPED_SECONDS:
                return rank
            if seconds >= WARN_SECONDS and rank not in self.told:
                self.told.add(rank)
                logger.warning("rank %d is stopped; `kill -CONT %d` makes its process go on", rank, pid)
        return None
