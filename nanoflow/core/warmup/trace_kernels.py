"""`python -m nanoflow.core.warmup.trace_kernels`: trace the kernels that an engine's start launches, compile them.

This process builds the same engine on a fake GPU, of two layers and without weights, and so learns which kernels
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

from nanoflow.core.config.engine_config import Config
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.fused_allreduce_norm import FusedAllReduceNorm
from nanoflow.core.distributed.process_group import one_shot_bytes
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution import cuda_graphs
from nanoflow.core.execution.build_runner import build_runner, processors_maker
from nanoflow.core.execution.plan import Plan
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.loading import dummy
from nanoflow.core.loading.hf_config import HFConfig
from nanoflow.core.ops import Ops
from nanoflow.core.registry.registry import Registry
from nanoflow.core.warmup.fake_cuda import GPU, Kernel, fake_cuda

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.sharedctypes import Synchronized

LAYERS = 2  # the first one has no residual yet; the others are like the second
MOST_PROCESSES = 32


class EchoGroup(FusedAllReduceNorm):
    """Other ranks that have the same as this one, for which sums take this one's part. Its tokens mean nothing.

    Args:
        size: number of ranks.
        most_bytes: of sums that are left to norms.
        device: of this one.
        ops: to sum with.
    """

    def __init__(self, size: int, most_bytes: int, device: torch.device, ops: Ops) -> None:
        self.size = size
        self.use([0] * size, 0, most_bytes, device, ops)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, -1)

    def broadcast(self, x: torch.Tensor) -> None:
        pass


def trace_kernels(config: Config, plan: Plan, gpu: GPU, num_ranks: int) -> list[Kernel]:
    """The kernels that rank 0 launches until its engine is built; tells why if it doesn't come to an end."""
    hf_config = HFConfig(plan.hf_config)
    if (hf_config.get("num_hidden_layers") or 0) > LAYERS:
        hf_config["num_hidden_layers"] = LAYERS
        if isinstance(types := hf_config.get("layer_types"), list):
            hf_config["layer_types"] = types[:LAYERS]
    config = replace(config, engine=replace(config.engine, load_format="dummy", num_kv_blocks=1))
    registry = Registry.load()
    unowned = patch.object(cuda_graphs, "unowned", lambda x: x)  # there is no memory
    with patch.object(dummy, "fill_random"), unowned, fake_cuda(gpu) as kernels:
        most_bytes = one_shot_bytes(config.engine.one_shot_kib)
        echo = EchoGroup(num_ranks, most_bytes, gpu.device, select_ops(gpu.device)) if num_ranks > 1 else None
        rank_group = RankGroup(ParallelContext(0, num_ranks, echo), None)
        try:
            plan = replace(plan, hf_config=hf_config)
            build_runner(config, registry, plan, rank_group, lambda: None, processors_maker(registry, plan))
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
    processes = start_compiling(trace_kernels(config, plan, gpu, num_ranks))
    threading.Thread(target=end_with_engine, daemon=True).start()  # not before the forks, which want no other thread
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
