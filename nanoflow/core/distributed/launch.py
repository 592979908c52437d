"""Starting an engine's ranks: as processes on this host, or as torchrun has started them, on one host or several."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from multiprocessing.connection import Client, Connection, Listener
from typing import NoReturn

import torch

from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.data.parallel import SINGLE_RANK, ParallelContext
from nanoflow.core.distributed.rank_group import Driver, RankGroup, Worker

LOCALHOST = "127.0.0.1"


def form_rank_group(config: Config) -> RankGroup:
    """This process's part among the ranks that `engine.tensor_parallel_size` asks for, which are started if need be.

    Raises:
        ConfigError: torchrun started another number of processes.
    """
    size = config.engine.tensor_parallel_size
    if size == 1:
        return RankGroup(SINGLE_RANK, None)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join_torchrun(size)
    return _start_workers(config, size)


def rank_device(device: torch.device, rank_group: RankGroup) -> torch.device:
    """A rank's device: one of the GPUs from `device` on; on a CPU all ranks share it.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    if device.type != "cuda" or rank_group.parallel.size == 1:
        return device
    first, count = device.index or 0, torch.cuda.device_count()
    needed = rank_group.parallel.size if rank_group.is_local else rank_group.local_rank + 1
    if first + needed > count:
        raise ConfigError(
            f"engine.tensor_parallel_size is {rank_group.parallel.size}, which takes a GPU for each rank of a host "
            f"from cuda:{first} on, but there are {count} here; use {max(1, count - first)} or engine.device=cpu."
        )
    return torch.device("cuda", first + rank_group.local_rank)


def end_process(code: int) -> NoReturn:
    """Leave at once: what PyTorch does at the end of a process may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_workers(config: Config, size: int) -> Driver:
    """Rank 0 of ranks on this host. Its store would listen on all interfaces, if it were not given a socket."""
    from torch.distributed import TCPStore

    listener = socket.create_server((LOCALHOST, 0), backlog=size)
    port, fd = listener.getsockname()[1], listener.detach()
    store = TCPStore(LOCALHOST, port, size, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    links, processes = [], []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    for _ in range(1, size):
        ours, theirs = socket.socketpair()
        with theirs:
            # Not by multiprocessing, which would run the caller's main module once more. In a session of its own, where
            # Ctrl-C doesn't reach it: rank 0 decides what becomes of it.
            command = [sys.executable, "-m", "nanoflow.core.engine.worker", str(theirs.fileno())]
            fds = [theirs.fileno()]
            processes.append(subprocess.Popen(command, pass_fds=fds, start_new_session=True, env=environment))
        links.append(Connection(ours.detach()))
    for rank, link in enumerate(links, 1):
        link.send((config, rank, size, port))
    return Driver(store, links, processes)


def join_driver(link: Connection) -> tuple[Config, Worker]:
    """The config and the part of a process that `form_rank_group` started, from what comes first through its socket."""
    from torch.distributed import TCPStore

    config, rank, size, port = link.recv()
    return config, Worker(ParallelContext(rank, size), TCPStore(LOCALHOST, port, size, is_master=False), link)


def _join_torchrun(size: int) -> RankGroup:
    """Ranks that torchrun has started, which meet at its store. If all are on one host, rank 0 listens to it alone."""
    from torch.distributed import PrefixStore, TCPStore

    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size != size:
        raise ConfigError(
            f"engine.tensor_parallel_size is {size}, but torchrun started {world_size} processes; make them equal."
        )
    one_host = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    whole = TCPStore(*address, size, is_master=rank == 0 and not torchrun_store, wait_for_workers=False)
    store = PrefixStore(f"nanoflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", whole)
    if rank:
        port, key = store.get("driver").decode().split(" ")
        link = Client((LOCALHOST if one_host else address[0], int(port)), authkey=bytes.fromhex(key))
        link.send_bytes(b"%d" % rank)
        return Worker(ParallelContext(rank, size), store, link, local_rank)
    key = secrets.token_bytes(16)
    with Listener((LOCALHOST if one_host else "", 0), backlog=size, authkey=key) as listener:
        store.set("driver", f"{listener.address[1]} {key.hex()}")
        arrived = [listener.accept() for _ in range(size - 1)]
    links = {int(link.recv_bytes()): link for link in arrived}
    for link in arrived:
        _send_at_once(link)
    return Driver(store, [links[other] for other in range(1, size)], [], local_rank)


def _send_at_once(link: Connection) -> None:
    """Don't hold the end of a message back until its beginning is acknowledged (Nagle's algorithm)."""
    with socket.socket(fileno=os.dup(link.fileno())) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
