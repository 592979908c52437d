"""What the device can do at best, measured: bytes read a second, and floating-point operations a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING

from nanoflow.workloads.floor import Speed

if TYPE_CHECKING:
    import torch

MIB = 2**20
TRIES = 20  # runs of each candidate; the best counts


def measure(device: torch.device, dtype: torch.dtype) -> Speed:
    """The best of several ways to read a large array, and the best product of two large matrices.

    Takes up to 4 GiB of the device's memory and gives it back.
    """
    import torch

    with torch.inference_mode():
        speed = Speed(bandwidth=_bandwidth(device), flops=_flops(device, dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return speed


def _bandwidth(device: torch.device) -> float:
    import torch

    size = 256 * MIB
    if device.type == "cuda":
        size = min(4096 * MIB, torch.cuda.mem_get_info(device)[0] // 2 // MIB * MIB)
    x = torch.ones(size // 4, device=device).view(torch.int32)
    return size / min(_best_time(read, device) for read in _readers(x))


def _readers(x: torch.Tensor) -> Iterator[Callable[[], object]]:
    """Ways to read all of the int32 array `x`."""
    import torch

    yield partial(torch.sum, x.view(torch.float32))
    if x.is_cuda and find_spec("triton"):
        from nanoflow.bench.read_kernel import readers

        yield from readers(x)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    return 2 * size**3 / _best_time(partial(torch.mm, a, b, out=torch.empty_like(a)), device)


def _best_time(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that doesn't count."""
    import torch

    action()
    if device.type != "cuda":
        times = []
        for _ in range(TRIES // 4):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(TRIES + 1)]
        marks[0].record()
        for mark in marks[1:]:
            action()
            mark.record()
        torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in pairwise(marks)) / 1000
