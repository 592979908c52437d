"""Which GPUs a job of a sweep uses, and that no two use the same one at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 0.2  # seconds between two looks for a GPU that is free


def wanted(composed: DictConfig) -> bool:
    """Whether a job with this config would run on a GPU."""
    device = _device(composed)
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device.startswith("cuda")


@contextmanager
def reserved(composed: DictConfig, number: int, folder: Path) -> Iterator[None]:
    """Let processes started meanwhile see one GPU for each rank only, once no other job of the sweep has it.

    Job n asks for the visible GPU n modulo their number first, times the ranks. A GPU that the config names (`cuda:1`),
    and what Slurm has assigned, stay as they are.

    Args:
        composed: the job's config.
        number: the job's.
        folder: the sweep's, where files to lock are put.
    """
    devices = visible()
    if _device(composed) not in ("auto", "cuda") or "SLURM_JOB_ID" in os.environ or not devices:
        yield
        return
    count = min(int(OmegaConf.select(composed, "engine.tensor_parallel_size", default=1)), len(devices))
    start = number * count % len(devices)
    with _first_free(devices[start:] + devices[:start], count, folder) as free:
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = ",".join(free)
        try:
            yield
        finally:
            if before is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = before


def visible() -> list[str]:
    """The names of the visible GPUs, as CUDA_VISIBLE_DEVICES has them."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def _first_free(devices: list[str], count: int, folder: Path) -> Iterator[list[str]]:
    """The first of the devices whose files nobody has locked; waits until there are so many, and takes none before.

    A process that dies gives its own back.
    """
    while True:
        with ExitStack() as locks:
            free: list[str] = []
            for device in devices:
                if len(free) < count and _locked(folder / f".gpu-{device}.lock", locks):
                    free.append(device)
            if len(free) == count:
                yield free
                return
        time.sleep(POLL)


def _locked(path: Path, locks: ExitStack) -> bool:
    """Try to lock the file until `locks` is left."""
    import fcntl

    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    locks.enter_context(file)
    return True


def _device(composed: DictConfig) -> str:
    return str(OmegaConf.select(composed, "engine.device", default="auto"))
