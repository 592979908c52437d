"""Options of the attention backends, and what must be installed for them. Imports no torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib.util import find_spec

from nanoflow.core.config.fields import is_int, option, require

# Top-level packages of FlashAttention-3, and of FlashAttention-2 and -4.
FLASH_PACKAGES = ("flash_attn_interface", "flash_attn")
INSTALL_FLASH = (
    "install FlashAttention-3 (module flash_attn_interface) or flash-attn: pip install 'nanoflow-engine[flash]'"
)


@dataclass(frozen=True)
class TorchConfig:
    """Options of `attention=torch`."""

    group: bool = option(True, "attend to sequences of similar lengths together; false: to one after the other")

    def __post_init__(self) -> None:
        require(isinstance(self.group, bool), "group", self.group, "true or false")


@dataclass(frozen=True)
class FlashConfig:
    """Options of `attention=flash`."""

    num_splits: int = option(0, "parts into which decoding cuts each context; 0: as many as fill the GPU")

    def __post_init__(self) -> None:
        require(
            is_int(self.num_splits) and 0 <= self.num_splits <= 128, "num_splits", self.num_splits, "a count up to 128"
        )


def flash_missing() -> str | None:
    """Why there is no FlashAttention, if so."""
    return no_gpu() or (
        None if any(map(find_spec, FLASH_PACKAGES)) else f"no FlashAttention is installed: {INSTALL_FLASH}"
    )


def triton_missing() -> str | None:
    """Why Triton's kernels can't run, if so. Its interpreter needs no GPU."""
    if not find_spec("triton"):
        return "the package triton is not installed: pip install triton"
    return None if interpreted() else no_gpu()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which Triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_gpu() -> str | None:
    """Why there is no GPU, if so. Looks for a driver, since asking torch would take seconds."""
    for driver in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so"):
        try:
            ctypes.CDLL(driver)
        except OSError:
            continue
        return None
    return "it needs a GPU, and there is no driver of one on this machine; use attention=torch."
