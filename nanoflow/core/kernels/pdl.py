"""Programmatic dependent launch: a kernel may start while those before it in the stream are still running.

A kernel launched with `pdl_options(x)` first lets the next one start (`pdl_launch`), and then, before it reads what
another one wrote or writes anything itself, waits for the one before (`pdl_wait`), which has then completed, as have
all before it. Until then it may read what no kernel on the way writes: parameters of the model, and what was worked out
at the start of the step by kernels that let the next one start only when they have waited themselves
(`pdl_wait_then_launch`), or have ended. So the time between two kernels, and the first loads of weights, hide behind
earlier ones. A program may end without a wait if it has nothing to do, but one of each kernel has to wait, or the
kernel could end before the one before it. On GPUs before Hopper, and under Triton's interpreter, kernels run one after
the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


def pdl_options(x: torch.Tensor) -> dict[str, Any]:
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
def pdl_launch(PDL: tl.constexpr):
    """Let the next kernel start, as soon as all programs of this one have come here or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait until the kernel before has completed and its writes can be seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_launch_then_wait(PDL: tl.constexpr):
    """Both, for kernels that have nothing to do in between."""
    pdl_launch(PDL)
    pdl_wait(PDL)


@triton.jit
def pdl_wait_then_launch(PDL: tl.constexpr):
    """Both, the other way round: when the next kernel starts, all before this one have completed."""
    pdl_wait(PDL)
    pdl_launch(PDL)


@triton.jit
def prefetch(pointers):
    """Bring the 128-byte lines around these addresses into the L2 cache, without waiting. They must be readable."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
