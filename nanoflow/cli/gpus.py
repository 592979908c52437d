"""Which GPU a job of a sweep uses, and that no two use the same one at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
def one_of(composed: DictConfig, number: int, folder: Path) -> Iterator[None]:
    """Let processes started meanwhile see one GPU only, once no other job of the sweep has it.

    Job n asks for the visible GPU n modulo their number first. A GPU that the config names (`cuda:1`), and what Slurm
    has assigned, stay as they are.

    Args:
        composed: the job's config.
        number: the job's.
        folder: the sweep's, where files to lock are put.
    """
    devices = visible()
    if _device(composed) not in ("auto", "cuda") or "SLURM_JOB_ID" in os.environ or not devices:
        yield
        return
    start = number % len(devices)
    with _first_free(devices[start:] + devices[:start], folder) as device:
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = device
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
def _first_free(devices: list[str], folder: Path) -> Iterator[str]:
    """The first of the devices whose file nobody has locked; waits for one. A process that dies gives its own back."""
    import fcntl

    while True:
        for device in devices:
            with (folder / f".gpu-{device}.lock").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield device
                return
        time.sleep(POLL)


def _device(composed: DictConfig) -> str:
    return str(OmegaConf.select(composed, "engine.device", default="auto"))
