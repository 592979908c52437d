"""Ranks that torchrun has started, on one host or several: how they find rank 0, and know that it is the right one."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import NamedTuple

from nanoflow.core.config.errors import ConfigError, NanoflowError
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.introduction import drive, follow
from nanoflow.core.distributed.processes import peer_pid
from nanoflow.core.distributed.rank_group import Driver, RankGroup, Worker

SECRET = "NANOFLOW_SECRET"  # environment variable: what only ranks of several hosts know
PATIENCE = 60.0  # seconds that ranks of one host may be apart when they begin
RETRY = 0.05  # seconds


class Place(NamedTuple):
    """What torchrun tells a process: its rank of so many, and which it is on its host."""

    rank: int
    size: int
    local_rank: int


def join_torchrun(size: int) -> RankGroup:
    """This process's part among the ranks that torchrun started.

    Raises:
        ConfigError: it started another number of processes; or on several hosts, and they share no secret.
    """
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size != size:
        raise ConfigError(
            f"engine.tensor_parallel_size is {size}, but torchrun started {world_size} processes; make them equal."
        )
    place = Place(rank, size, local_rank)
    return _on_one_host(place) if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"] else _on_several(place)


def private_folder(parent: Path) -> Path:
    """A folder that this user alone can enter, made if need be.

    Raises:
        NanoflowError: somebody else has made it.
    """
    folder = parent / f"nanoflow-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise NanoflowError(f"Ranks meet in {folder}, which must be a folder of this user alone; remove it.")
    return folder


def _on_one_host(place: Place) -> RankGroup:
    """Rank 0 waits for the others at a socket in a private folder, which is gone once all have come."""
    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    path = private_folder(Path(tempfile.gettempdir())) / hashlib.sha256("/".join(run).encode()).hexdigest()[:16]
    if place.rank:
        return follow(place.rank, place.size, _connected(path, place.rank))[0]
    path.unlink(missing_ok=True)
    found: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(place.size)
        while len(found) < place.size - 1:
            arrived, _ = listener.accept()
            found[int.from_bytes(arrived.recv(4), "little")] = arrived
    path.unlink(missing_ok=True)
    sockets = [found[rank] for rank in range(1, place.size)]
    return drive(sockets, [peer_pid(each) for each in sockets], [])


def _connected(path: Path, rank: int) -> socket.socket:
    """A socket to rank 0, which may still have to open its own."""
    deadline = time.monotonic() + PATIENCE
    while True:
        to_driver = socket.socket(socket.AF_UNIX)
        try:
            to_driver.connect(str(path))
            to_driver.sendall(rank.to_bytes(4, "little"))
            return to_driver
        except OSError as error:
            to_driver.close()
            if time.monotonic() > deadline:
                raise NanoflowError(f"Rank 0 did not come within {PATIENCE:.0f} seconds; see what it says.") from error
            time.sleep(RETRY)


def _on_several(place: Place) -> RankGroup:
    """Over TCP, where each proves that it knows the secret; torchrun's store, which asks for none, tells the port."""
    from torch.distributed import PrefixStore, TCPStore

    secret = os.environ.get(SECRET)
    if not secret:
        raise ConfigError(
            f"Ranks on several hosts need a secret, by which they know each other; set {SECRET} to the same long "
            "random text on all hosts."
        )
    key = hashlib.sha256(secret.encode()).digest()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    whole = TCPStore(*address, place.size, is_master=place.rank == 0 and not torchrun_store, wait_for_workers=False)
    store = PrefixStore(f"nanoflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", whole)
    if place.rank:
        link = Client((address[0], int(store.get("driver"))), authkey=key)
        link.send_bytes(b"%d" % place.rank)
        return Worker(ParallelContext(place.rank, place.size), store, link, place.local_rank)
    with Listener(("", 0), backlog=place.size, authkey=key) as listener:
        store.set("driver", str(listener.address[1]))
        links = accept_ranks(listener, place.size)
    for link in links:
        _send_at_once(link)
    return Driver(store, links, [], place.local_rank)


def accept_ranks(listener: Listener, size: int) -> list[Connection]:
    """Links to ranks 1, 2, ...; who doesn't know the secret is sent away."""
    links: dict[int, Connection] = {}
    while len(links) < size - 1:
        try:
            link = listener.accept()
            links[int(link.recv_bytes())] = link
        except (AuthenticationError, EOFError, OSError):
            continue
    return [links[rank] for rank in range(1, size)]


def _send_at_once(link: Connection) -> None:
    """Don't hold the end of a message back until its beginning is acknowledged (Nagle's algorithm)."""
    with socket.socket(fileno=os.dup(link.fileno())) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
