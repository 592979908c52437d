"""Options of the attention backends, and what must be installed for them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from nanoflow.core.config import is_int, option, require

# Top-level packages of FlashAttention-3, and of FlashAttention-2 and -4.
FLASH_PACKAGES = ("flash_attn_interface", "flash_attn")
INSTALL_FLASH = "install FlashAttention-3 (module flash_attn_interface) or flash-attn: pip install 'nanoflow[flash]'"


@dataclass(frozen=True)
class FlashConfig:
    """Options of `attention=flash`."""

    num_splits: int = option(0, "Parts into which decoding cuts each context; 0: as many as fill the GPU.")

    def __post_init__(self) -> None:
        require(
            is_int(self.num_splits) and 0 <= self.num_splits <= 128, "num_splits", self.num_splits, "a count up to 128"
        )


def flash_missing() -> str | None:
    """Why there is no FlashAttention, if so."""
    return None if any(map(find_spec, FLASH_PACKAGES)) else f"no FlashAttention is installed: {INSTALL_FLASH}"


def triton_missing() -> str | None:
    """Why there is no Triton, if so."""
    return None if find_spec("triton") else "the package triton is not installed: pip install triton"
