"""The group of ranks on one host's CPU: tensors go through socket pairs, which nobody else can reach."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Mapping

import torch

from nanoflow.core.data.parallel import Group, RankLost

DIRECT_BYTES = 64 * 1024  # of a sum; larger ones are made in parts, each by one rank
BUFFER_BYTES = 4 * 2**20  # of a socket, as far as the system lets it have so many
SLICE = 0.2  # seconds of waiting between two looks at the other ranks
SILENT = 5.0  # seconds without an answer after which a rank is named
logger = logging.getLogger("nanoflow")


class SocketGroup(Group):
    """Ranks that exchange tensors through a socket to each of the others.

    Whoever waits looks at the others from time to time, and can be interrupted.

    Args:
        rank: this one's place.
        peers: a stream socket to each other rank, by its place.
        watch: called while waiting; raises if the wait is in vain.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], watch: Callable[[], None]) -> None:
        self.rank, self.size = rank, 1 + len(peers)
        self.peers, self.watch = dict(peers), watch
        self.scratch = torch.empty(0, dtype=torch.uint8)  # for what comes from others; as large as the largest sum
        for peer in peers.values():
            peer.setblocking(False)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1)
        if self.size == 2 or x.nbytes <= DIRECT_BYTES:
            self._sum(dict.fromkeys(self.peers, flat), flat)
            return x
        shares = flat.tensor_split(self.size)
        ours = shares[self.rank]
        self._sum({rank: shares[rank] for rank in self.peers}, ours)
        self._exchange(dict.fromkeys(self.peers, as_bytes(ours)), {rank: as_bytes(shares[rank]) for rank in self.peers})
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._gathered(x.reshape(-1))
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2).contiguous()

    def broadcast(self, x: torch.Tensor) -> None:
        data = as_bytes(x.view(-1))
        if self.rank == 0:
            self._exchange(dict.fromkeys(self.peers, data), {})
        else:
            self._exchange({}, {0: data})

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()

    def _gathered(self, flat: torch.Tensor) -> torch.Tensor:
        """All ranks' `flat` [N], as [size, N]."""
        parts = flat.new_empty(self.size, len(flat))
        parts[self.rank] = flat
        ours = as_bytes(parts[self.rank])
        self._exchange(dict.fromkeys(self.peers, ours), {rank: as_bytes(parts[rank]) for rank in self.peers})
        return parts

    def _sum(self, sent: Mapping[int, torch.Tensor], ours: torch.Tensor) -> None:
        """Overwrite `ours` [N] with its sum with what the others send, in the order of ranks: all get the same bits."""
        size = ours.nbytes
        if self.scratch.nbytes < self.size * size:
            with torch.inference_mode(mode=False):  # else it could be written to in that mode alone
                self.scratch = torch.empty(self.size * size, dtype=torch.uint8)
        rows = self.scratch[: self.size * size].view(ours.dtype).view(self.size, -1)
        self._exchange(
            {rank: as_bytes(part) for rank, part in sent.items()}, {rank: as_bytes(rows[rank]) for rank in self.peers}
        )
        parts = [ours if rank == self.rank else rows[rank] for rank in range(self.size)]
        if self.size == 2:
            torch.add(*parts, out=ours)
            return
        total = torch.add(parts[0], parts[1], out=rows[self.rank])  # which holds nothing
        for part in parts[2:]:
            total += part
        ours.copy_(total)

    def _exchange(self, sent: dict[int, memoryview], received: dict[int, memoryview]) -> None:
        """Send and fill buffers, of each rank's in its own time; all of them are done when this returns.

        Raises:
            RankLost: a rank has closed its socket.
        """
        sent = {rank: view for rank, view in sent.items() if view.nbytes}
        received = {rank: view for rank, view in received.items() if view.nbytes}
        began, is_told = time.monotonic(), False
        while True:
            self._send(sent)
            self._receive(received)
            if not sent and not received:
                return
            if self._await(sent, received):
                continue
            self.watch()
            if not is_told and self.rank == 0 and time.monotonic() - began > SILENT:
                silent = ", ".join(map(str, sorted({*sent, *received})))
                logger.warning("rank %s of %d has not answered for %.0f seconds", silent, self.size, SILENT)
                is_told = True

    def _send(self, sent: dict[int, memoryview]) -> None:
        for rank in list(sent):
            try:
                rest = sent[rank][self.peers[rank].send(sent[rank]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise RankLost(f"rank {rank} is gone") from error
            if rest.nbytes:
                sent[rank] = rest
            else:
                del sent[rank]

    def _receive(self, received: dict[int, memoryview]) -> None:
        for rank in list(received):
            try:
                size = self.peers[rank].recv_into(received[rank])
            except BlockingIOError:
                continue
            except OSError as error:
                raise RankLost(f"rank {rank} is gone") from error
            if size == 0:
                raise RankLost(f"rank {rank} is gone")
            if size < received[rank].nbytes:
                received[rank] = received[rank][size:]
            else:
                del received[rank]

    def _await(self, sent: dict[int, memoryview], received: dict[int, memoryview]) -> bool:
        """Wait until a socket is ready, not for long; whether one is."""
        poll = select.poll()
        for rank in {*sent, *received}:
            wanted = (select.POLLIN if rank in received else 0) | (select.POLLOUT if rank in sent else 0)
            poll.register(self.peers[rank], wanted)
        return bool(poll.poll(1000 * SLICE))


def as_bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor [N] on the CPU."""
    return memoryview(flat.view(torch.uint8).numpy())
