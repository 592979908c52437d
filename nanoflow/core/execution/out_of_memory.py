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
        ConfigError: there is none. It says how much was free before.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory().size
    try:
        yield
    except (MemoryError, RuntimeError, PluginError) as error:  # a GPU's OutOfMemoryError is a RuntimeError
        if not any(map(_is_lack_of_memory, (error, error.__cause__))):
            raise
        raise ConfigError(
            f"There is no room for {what} in the {free / GIB:.1f} GiB of memory that were free on {device}; {advice}."
        ) from None


def _is_lack_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OF_CPU_ALLOCATOR in str(error)
