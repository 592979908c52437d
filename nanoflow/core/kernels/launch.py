"""Programmatic dependent launch: a kernel may start while the one before it in the stream is still running.

A kernel launched with `overlap(x)` calls `begin(PDL)`, and before that it reads nothing but parameters of the model and
writes nothing. `begin` waits until the kernel before has completed and its writes can be seen, and then allows the next
one to start. So the time between two kernels, and the first loads of weights, hide behind the earlier one, and no more
than two kernels are ever on the way. (One that let the next start before its own wait could bring three together, which
kernels of libraries such as cuBLAS and FlashAttention don't expect.) On GPUs before Hopper, and under Triton's
interpreter, kernels run one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch options for a kernel on x's device."""
    if x.is_cuda and _capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def has_room(device: torch.device) -> bool:
    """Whether a program may have as much shared memory as on an H100, for which the settings of kernels were chosen."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 * 1024


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernel before, and let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
