"""A GPU that isn't there: code runs on it as on a real one, but nothing is computed and no kernel is launched.

Its tensors are PyTorch's meta tensors, which have shapes, strides and types but no values, made to say that they lie on
the GPU. Tensors of the host are real. What is launched on it is written down instead: a kernel and what Triton would
compile it for, which follows from types, sizes and alignments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch.overrides import TorchFunctionMode

T = torch.Tensor
READS = (T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__)
META = torch.device("meta")


@dataclass(frozen=True)
class GPU:
    """What there is to know of a GPU.

    Attributes:
        device: what it is called.
        capability: as `torch.cuda.get_device_capability` has it.
        properties: those of `torch.cuda.get_device_properties` that all GPUs of a model share.
    """

    device: torch.device
    capability: tuple[int, int]
    properties: dict[str, int | str]

    @classmethod
    def at(cls, device: torch.device) -> GPU:
        """A real one."""
        found = torch.cuda.get_device_properties(device)
        names = (name for name in dir(found) if not name.startswith(("_", "pci_", "uuid")))
        values = {name: getattr(found, name) for name in names}
        properties = {name: value for name, value in values.items() if isinstance(value, int | str)}
        return cls(device, torch.cuda.get_device_capability(device), properties)


@dataclass(frozen=True)
class Kernel:
    """A kernel of Triton's, and what to compile it for, as its `preload` takes it."""

    function: Any
    specialization: str


@contextmanager
def fake_cuda(gpu: GPU) -> Iterator[list[Kernel]]:
    """Work on the GPU as if it were there. Triton goes on to compile for it afterwards.

    Yields:
        The kernels that were launched, each once, in the order of their first launches.
    """
    import triton
    from triton.runtime.driver import driver

    kernels: list[Kernel] = []
    known = set()

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        what = fn.jit_function, compile["specialization_data"]
        if what not in known:
            known.add(what)
            kernels.append(Kernel(*what))
        return True  # not to be compiled now

    target = triton.backends.compiler.GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )

    def launch(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: kernel.warmup(*args, grid=grid, **options)

    with ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.jit_cache_hook = record
        stack.enter_context(patch.object(triton.KernelInterface, "__getitem__", launch))
        stack.enter_context(patch.multiple(torch.cuda, **_replies(gpu)))
        stack.enter_context(Tensors(gpu.device))
        yield kernels


def _replies(gpu: GPU) -> dict[str, Any]:
    """What takes the place of functions of `torch.cuda`."""
    silent = (
        "CUDAGraph", "Event", "Stream", "current_stream", "empty_cache", "graph_pool_handle", "reset_peak_memory_stats",
        "set_device",
    )  # fmt: skip
    return {name: MagicMock() for name in silent} | {
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.properties["name"],
        "get_device_properties": lambda device=None: SimpleNamespace(**gpu.properties),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "stream": lambda stream: nullcontext(),
    }


class Tensors(TorchFunctionMode):
    """Makes meta tensors of those on GPUs, and has them say that they are on `device`. What is read from them is 0."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.answers: dict[Any, Callable[..., Any]] = {
            T.is_cuda.__get__: lambda x: x.is_meta,
            T.device.__get__: lambda x: device if x.is_meta else x.device,
            T.pin_memory: lambda x: x,
            T.copy_: lambda x, source, **_: x if source.is_meta else x.copy_(source),
            **{read: self._reading(read) for read in READS},
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        kwargs = {name: _elsewhere(value) for name, value in kwargs.items() if name != "pin_memory"}
        args = [_elsewhere(value) for value in args]
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            returned = getattr(func, "default", func)._schema.returns  # an operator from outside PyTorch
            like = next(value for value in args if isinstance(value, T))
            results = tuple(torch.empty_like(like) for _ in returned)
            return results if len(results) > 1 else results[0]

    @staticmethod
    def _reading(read: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: read(torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x)


def _elsewhere(value: Any) -> Any:
    """A meta device for one of a GPU."""
    return META if isinstance(value, torch.device) and value.type == "cuda" else value
