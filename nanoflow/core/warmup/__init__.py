"""Warm-up of Triton's cache: on a first start, kernels are compiled in other processes while weights are loaded."""

from nanoflow.core.warmup.precompile import precompiled

__all__ = [
    "precompiled",
]
