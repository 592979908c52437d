"""Starting an engine's ranks: as processes on this host, or as torchrun has started them, on one host or several."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from typing import NoReturn

import torch

from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.data.parallel import SINGLE_RANK
from nanoflow.core.distributed.cores import usable_cores
from nanoflow.core.distributed.introduction import drive, follow
from nanoflow.core.distributed.rank_group import Driver, RankGroup, Worker
from nanoflow.core.distributed.torchrun import join_torchrun

PLACE = struct.Struct("<2i")  # a worker's rank, and how many there are


def form_rank_group(config: Config) -> RankGroup:
    """This process's part among the ranks that `engine.tensor_parallel_size` asks for, which are started if need be.

    Raises:
        ConfigError: torchrun started another number of processes; or as `join_torchrun`.
    """
    size = config.engine.tensor_parallel_size
    if size == 1:
        return RankGroup(SINGLE_RANK, None)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return join_torchrun(size)
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
    """Rank 0 of ranks on this host."""
    if not hasattr(socket, "send_fds"):
        raise ConfigError(f"engine.tensor_parallel_size is {size}, which this system can't do; set it to 1.")
    sockets, processes = [], []
    environment = worker_environment(size)
    for _ in range(1, size):
        ours, theirs = socket.socketpair()
        with theirs:
            # Not by multiprocessing, which would run the caller's main module once more. In a session of its own, where
            # Ctrl-C doesn't reach it: rank 0 decides what becomes of it.
            command = [sys.executable, "-m", "nanoflow.core.engine.worker", str(theirs.fileno())]
            fds = [theirs.fileno()]
            processes.append(subprocess.Popen(command, pass_fds=fds, start_new_session=True, env=environment))
        sockets.append(ours)
    for rank, ours in enumerate(sockets, 1):
        ours.sendall(PLACE.pack(rank, size))
    driver = drive(sockets, [process.pid for process in processes], processes)
    for link in driver.links:
        link.send(config)
    return driver


def worker_environment(size: int) -> dict[str, str]:
    """Environment of a worker's process: it finds the same modules, and has its share of the cores for its threads."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // size)))
    return environment


def join_driver(to_driver: socket.socket) -> tuple[Config, Worker, str]:
    """The config, the part, and the ranks' folder of a process that `form_rank_group` started, from what comes first.

    Raises:
        EOFError: rank 0 is gone.
    """
    if len(place := to_driver.recv(PLACE.size, socket.MSG_WAITALL)) < PLACE.size:
        raise EOFError("rank 0 is gone")
    worker, folder = follow(*PLACE.unpack(place), to_driver)
    return worker.link.recv(), worker, folder
