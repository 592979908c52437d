"""What doesn't fit into a device's memory, told in a sentence that says what could be smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanoflow.core.config.errors import ConfigError, PluginError
from nanoflow.core.execution.free_memory import available_memory

GIB = 2**30
OF_CPU_ALLOCATOR = "can't allocate memory"  # PyTorch's says so in a RuntimeError


@contextmanager
def told_if_too_large(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """For the time in which `what` is put into the memory of `device`.

    Args:
        what: "the weights", say.
        device: a CPU, or a GPU.
        advice: what to change if there is no room, as an imperative.

    Raises:
        ConfigError: there is none. It says how much is left.
    """
    try:
        yield
    except (MemoryError, RuntimeError, PluginError) as error:  # a GPU's OutOfMemoryError is a RuntimeError
        if not any(map(_is_lack_of_memory, (error, error.__cause__))):
            raise
        raise ConfigError(
            f"There is no room for {what} on {device}, where {_left(device)} are left; {advice}."
        ) from None


def _left(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{free / GIB:.1f} of {total / GIB:.1f} GiB"
    return f"{available_memory().size / GIB:.1f} GiB"


def _is_lack_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OF_CPU_ALLOCATOR in str(error)
