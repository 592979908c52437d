"""Compiling kernels ahead: on a cold cache of Triton's, other processes fill it while this one loads weights.

A stamp beside the cache says that it was done for such an engine, so that a warm start looks for a file and no more.
The stamp holds what went wrong, if anything did: then kernels are compiled when they are launched, one by one.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanoflow.core.config.engine_config import Config
from nanoflow.core.warmup.fake_cuda import GPU

if TYPE_CHECKING:
    from nanoflow.core.distributed.rank_group import RankGroup
    from nanoflow.core.execution.plan import Plan

COMMAND = (sys.executable, "-m", "nanoflow.core.warmup.trace_kernels")
PACKAGE = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds


@contextmanager
def precompiled(config: Config, plan: Plan, rank_group: RankGroup) -> Iterator[Callable[[], None]]:
    """Compile the kernels that building this engine will launch, if that was not done before. One rank of a host does.

    Yields:
        What waits until they are there.
    """
    helper = None
    on_nvidia = plan.device.type == "cuda" and torch.version.hip is None
    if config.engine.accelerate and on_nvidia and sys.platform == "linux" and rank_group.local_rank == 0:
        with suppress(Exception):  # no Triton, a cache that can't be written to, ...: it is no more than a help
            helper = _start(config, plan, rank_group.parallel.size)
    try:
        yield helper.wait if helper else lambda: None
    finally:
        if helper:
            helper.close()


def _start(config: Config, plan: Plan, num_ranks: int) -> Helper | None:
    from triton import knobs

    gpu = GPU.at(plan.device)
    stamp = Path(knobs.cache.dir) / "nanoflow" / fingerprint(config, plan, gpu, num_ranks)
    return None if stamp.exists() else Helper(COMMAND, (config, plan, gpu, num_ranks), stamp)


def fingerprint(config: Config, plan: Plan, gpu: GPU, num_ranks: int) -> str:
    """A name for all that decides which kernels there will be, and how they are compiled."""
    import triton

    options = config.engine
    sources = [file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))]
    plugins = config.plugins.get("model"), config.plugins.get("attention")
    parts = (
        torch.__version__, triton.__version__, gpu.capability, gpu.properties, num_ranks, plugins, options.block_size,
        options.enforce_eager, options.graph_sizes, options.graph_tokens, options.one_shot_kib,
        sorted(plan.hf_config.items()), plan.dtype, plan.max_model_len, plan.scheduler_config, sources,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Helper:
    """A process that works beside this one, and ends when it does or earlier.

    Args:
        command: what to run; it reads the job from its standard input.
        job: what can be pickled.
        stamp: a file that is there once the process was waited for. Holds what it wrote to its standard error.
    """

    def __init__(self, command: tuple[str, ...], job: Any, stamp: Path) -> None:
        job = pickle.dumps(job)
        self.stamp, self.log = stamp, stamp.with_name(f"{stamp.name}.{os.getpid()}")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        # Without GPUs, whose memory is about to be measured.
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment
                )
        except OSError:
            self.log.unlink(missing_ok=True)
            raise
        self.input: Any = self.process.stdin
        with suppress(OSError):  # it has ended already
            self.input.write(job)
            self.input.flush()

    def wait(self) -> None:
        """Until it has done all it can; not for ever."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        with suppress(OSError):
            self.log.replace(self.stamp)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        with suppress(OSError):
            self.input.close()
        self.log.unlink(missing_ok=True)
