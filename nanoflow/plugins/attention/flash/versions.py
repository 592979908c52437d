"""The versions of FlashAttention behind one call, and which of them is installed and can serve.

FlashAttention-2 (Dao, 2023), FlashAttention-3 for Hopper (Shah et al., 2024), FlashAttention-4 (`flash_attn.cute`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.plugins.attention.options import INSTALL_FLASH


@dataclass(slots=True)
class Rows:
    """Sequences of a batch that one call serves.

    Attributes:
        query_start_S1: int32; sequence s has queries `query_start[s]` to `query_start[s + 1]`.
        context_lens_S: int32.
        block_tables_SB: int32.
        max_query_len: the longest, or more.
        max_context_len: the longest, or more; the same in the plan and in the call.
        num_splits: parts into which a sequence's context is cut, 0 if FlashAttention shall decide.
        window: how many tokens, itself included, a query sees; None for all.
        metadata: what `FlashVersion.prepare` worked out.
    """

    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    max_query_len: int
    max_context_len: int
    num_splits: int
    window: int | None = None
    metadata: torch.Tensor | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """Tokens before and after a query that it sees, as FlashAttention wants it: -1 for all."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


class FlashVersion(ABC):
    """One version. `module` is what its functions are imported from."""

    module: ClassVar[str]
    name: ClassVar[str]

    def __init__(self, context: AttentionContext) -> None:
        self.context = context
        self.functions: ModuleType = import_module(self.module)

    @classmethod
    @abstractmethod
    def why_not(cls, context: AttentionContext) -> str | None:
        """Why it can't serve `context`, if so, given that it is installed. Starts with what it needs."""

    def prepare(self, rows: Rows) -> None:  # noqa: B027 (not every version has something to prepare)
        """Work out on the device what all layers of a step share."""

    @abstractmethod
    def __call__(
        self, rows: Rows, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
    ) -> torch.Tensor:
        """Attention [T, N, H] of the rows' queries."""


class FlashAttention3(FlashVersion):
    """Hopper only; any block size."""

    module = "flash_attn_interface"
    name = "FlashAttention-3"

    @classmethod
    def why_not(cls, context: AttentionContext) -> str | None:
        if torch.cuda.get_device_capability(context.device)[0] != 9:
            return "needs a Hopper GPU"
        return None

    def prepare(self, rows: Rows) -> None:
        c = self.context
        rows.metadata = self.functions.get_scheduler_metadata(
            len(rows.context_lens_S), rows.max_query_len, rows.max_context_len, c.num_heads, c.num_kv_heads, c.head_dim,
            rows.context_lens_S, c.dtype, cu_seqlens_q=rows.query_start_S1 if rows.max_query_len > 1 else None,
            page_size=c.block_size, causal=True, window_size=rows.window_size, num_splits=rows.num_splits,
        )  # fmt: skip

    def __call__(
        self, rows: Rows, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
    ) -> torch.Tensor:
        chunks = rows.max_query_len > 1
        out = self.functions.flash_attn_with_kvcache(
            query_TNH if chunks else query_TNH.unsqueeze(1), key_BPKH, value_BPKH, cache_seqlens=rows.context_lens_S,
            page_table=rows.block_tables_SB, cu_seqlens_q=rows.query_start_S1 if chunks else None,
            max_seqlen_q=rows.max_query_len, softmax_scale=self.context.scale, causal=True,
            window_size=rows.window_size, scheduler_metadata=rows.metadata, num_splits=rows.num_splits,
        )  # fmt: skip
        return out if chunks else out.squeeze(1)


class FlashAttention4(FlashVersion):
    """Serves paged caches on Blackwell only."""

    module = "flash_attn.cute"
    name = "FlashAttention-4"

    @classmethod
    def why_not(cls, context: AttentionContext) -> str | None:
        if torch.cuda.get_device_capability(context.device)[0] not in (10, 11):
            return "needs a Blackwell GPU for a paged cache"
        if context.head_dim not in (64, 96, 128):
            return f"needs a head dim of 64, 96 or 128, not {context.head_dim}"
        return None

    def __call__(
        self, rows: Rows, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
    ) -> torch.Tensor:
        out = self.functions.flash_attn_varlen_func(
            query_TNH, key_BPKH, value_BPKH, cu_seqlens_q=rows.query_start_S1, seqused_k=rows.context_lens_S,
            page_table=rows.block_tables_SB, softmax_scale=self.context.scale, causal=True, num_splits=rows.num_splits,
            window_size=(None, None) if rows.window is None else rows.window_size,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out


class FlashAttention2(FlashVersion):
    """Its paged kernels take blocks of 256 tokens and multiples of it."""

    module = "flash_attn"
    name = "FlashAttention-2"

    @classmethod
    def why_not(cls, context: AttentionContext) -> str | None:
        if torch.cuda.get_device_capability(context.device) < (8, 0):
            return "needs a GPU of the Ampere generation or later"
        if context.block_size % 256:
            return f"needs a block size that is a multiple of 256, not {context.block_size}"
        return None

    def prepare(self, rows: Rows) -> None:
        if rows.max_query_len > 1:  # it takes lengths of contexts as the places where each would start in a row
            rows.metadata = F.pad(rows.context_lens_S.cumsum(0, dtype=torch.int32), (1, 0))

    def __call__(
        self, rows: Rows, query_TNH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
    ) -> torch.Tensor:
        scale = self.context.scale
        if rows.max_query_len > 1:
            return self.functions.flash_attn_varlen_func(
                query_TNH, key_BPKH, value_BPKH, rows.query_start_S1, rows.metadata, rows.max_query_len,
                rows.max_context_len, softmax_scale=scale, causal=True, window_size=rows.window_size,
                block_table=rows.block_tables_SB,
            )  # fmt: skip
        out = self.functions.flash_attn_with_kvcache(
            query_TNH.unsqueeze(1), key_BPKH, value_BPKH, cache_seqlens=rows.context_lens_S,
            block_table=rows.block_tables_SB, softmax_scale=scale, causal=True, window_size=rows.window_size,
            num_splits=rows.num_splits,
        )  # fmt: skip
        return out.squeeze(1)


VERSIONS: tuple[type[FlashVersion], ...] = (FlashAttention3, FlashAttention4, FlashAttention2)  # the best first


def installed() -> list[type[FlashVersion]]:
    """Those whose package is there. Imports none of them."""
    return [version for version in VERSIONS if find_spec(version.module.partition(".")[0]) is not None]


def choose(context: AttentionContext) -> tuple[type[FlashVersion] | None, str]:
    """The best version that can serve `context`; if there is none, why."""
    if context.device.type != "cuda":
        return None, f"it needs a GPU, and the engine runs on the device {str(context.device)!r}."
    if context.dtype not in (torch.float16, torch.bfloat16):
        return None, f"FlashAttention serves float16 and bfloat16, not {context.dtype}."
    if context.head_dim > 256 or context.head_dim % 8:
        return None, f"FlashAttention serves head dims that are multiples of 8 up to 256, not {context.head_dim}."
    reasons = []
    for version in installed():
        reason = version.why_not(context) or _import_error(version)
        if reason is None:
            return version, ""
        reasons.append(f"{version.name} {reason}")
    return None, f"{'; '.join(reasons) or 'No FlashAttention is installed'}: {INSTALL_FLASH}"


def _import_error(version: type[FlashVersion]) -> str | None:
    try:
        import_module(version.module)
    except Exception as error:  # a wheel built for another torch fails in ways of its own
        return f"can't be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None
