"""`python -m nanoflow.core.rehearsal`: compile the kernels that the start of an engine will launch, while it loads.

This process builds the same engine on an imagined GPU, of two layers and without weights, and so learns which kernels
there will be. Then it compiles them in as many processes as there are processors. The engine finds them in Triton's
cache. What is missed here is compiled when it is launched.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from nanoflow.core import build, checkpoint
from nanoflow.core.config import Config
from nanoflow.core.imagined import GPU, Kernel, imagined
from nanoflow.core.parallel import ParallelContext
from nanoflow.core.process_group import one_shot_bytes
from nanoflow.core.registry import Registry
from nanoflow.core.sums_in_norms import SumsInNorms
from nanoflow.core.team import Team

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.sharedctypes import Synchronized

LAYERS = 2  # the first one has no residual yet; the others are like the second
MOST_PROCESSES = 32


class Echo(SumsInNorms):
    """Other ranks that have the same as this one, for which sums take this one's part. Its tokens mean nothing.

    Args:
        size: number of ranks.
        most_bytes: of sums that are left to norms.
        device: of this one.
    """

    def __init__(self, size: int, most_bytes: int, device: torch.device) -> None:
        self.size = size
        self.use([0] * size, 0, most_bytes, device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, -1)

    def broadcast(self, x: torch.Tensor) -> None:
        pass


def rehearse(config: Config, plan: build.Plan, gpu: GPU, num_ranks: int) -> list[Kernel]:
    """The kernels that rank 0 launches until its engine is built; tells why if it doesn't come to an end."""
    hf_config = build.HFConfig(plan.hf_config)
    if (hf_config.get("num_hidden_layers") or 0) > LAYERS:
        hf_config["num_hidden_layers"] = LAYERS
    config = replace(config, engine=replace(config.engine, load_format="dummy", num_kv_blocks=1))
    registry = Registry.load()
    with patch.object(checkpoint, "fill_random"), imagined(gpu) as kernels:
        echo = Echo(num_ranks, one_shot_bytes(config.engine.one_shot_kib), gpu.device) if num_ranks > 1 else None
        team = Team(ParallelContext(0, num_ranks, echo), None)
        try:
            build.build_runner(config, registry, replace(plan, hf_config=hf_config), team, lambda: None)
        except Exception:
            traceback.print_exc()
    return kernels


def start_compiling(kernels: list[Kernel]) -> list[BaseProcess]:
    """Processes that fill Triton's cache with them, forked, so that they have what is imported here."""
    kernels = sorted(kernels, key=lambda kernel: -len(kernel.function.src))  # these take longest
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fork = multiprocessing.get_context("fork")
    turn = fork.Value("i", 0)
    processes: list[BaseProcess] = [
        fork.Process(target=_compile, args=(kernels, turn), daemon=True)
        for _ in range(min(processors, MOST_PROCESSES, len(kernels)))
    ]
    for process in processes:
        process.start()
    return processes


def _compile(kernels: list[Kernel], turn: Synchronized[int]) -> None:
    launcher = None
    with suppress(Exception):  # without the GPU's driver: what launches a kernel is compiled by the engine, then
        launcher = _launcher()
    for kernel in _take(kernels, turn):
        try:
            compiled = kernel.function.preload(kernel.specialization)
            if launcher is not None:
                launcher(compiled.src, compiled.metadata)
        except Exception:
            traceback.print_exc()


def _take(kernels: list[Kernel], turn: Synchronized[int]) -> Iterator[Kernel]:
    """Those that no other process has taken."""
    while True:
        with turn.get_lock():
            index = turn.value
            turn.value += 1
        if index >= len(kernels):
            return
        yield kernels[index]


def _launcher() -> Any:
    """What makes the host's part of a kernel, which Triton caches apart from the GPU's part."""
    from triton.backends import backends

    return backends["nvidia"].driver().launcher_cls


def end_with_engine() -> None:
    """Wait until the engine is there or gone, then end all processes of this session."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Compile for what comes through standard input, whose end is the end of this process."""
    config, plan, gpu, num_ranks = pickle.load(sys.stdin.buffer)
    processes = start_compiling(rehearse(config, plan, gpu, num_ranks))
    threading.Thread(target=end_with_engine, daemon=True).start()  # not before the forks, which want no other thread
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
