"""Tile sizes and launch settings of the Triton kernels, found ahead by `benchmarks/attention.py --tune`.

Nothing is tuned at run time, so that no start and no first request waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from nanoflow.core.contracts.attention_context import AttentionContext

Settings = TypeVar("Settings", "DecodeSettings", "PrefillSettings")


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How the decode kernel runs.

    Attributes:
        block_n: keys in a tile.
        num_warps: warps of a program.
        num_stages: depth of the load pipeline; 1 for none.
        waves: programs a multiprocessor, over all KV heads.
        least: fewest tiles in a share, which then has those of one sequence only; 0 for equal shares.
        ahead: tokens, a power of two, whose keys and values a program asks for before the kernel before has ended.
        projects: whether the kernel also norms, rotates and stores, in steps that are uniform_decode.
    """

    block_n: int
    num_warps: int
    num_stages: int
    waves: float
    least: int = 0
    ahead: int = 0
    projects: bool = False

    def shared_memory(self, row_bytes: int) -> int:
        """Bytes that the tiles in flight take, with keys and values of `row_bytes` each."""
        return self.num_stages * self.block_n * 2 * row_bytes


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    """How the prefill kernel runs: `block_m` rows of queries by `block_n` keys a tile, the rest as for decode."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_memory(self, row_bytes: int) -> int:
        """Bytes that the tiles take, with rows of `row_bytes`."""
        return (self.block_m + self.num_stages * self.block_n * 2) * row_bytes


# By the most sequences that a row is for. Searched on an H100 in whole decode steps of Qwen3-0.6B (16-bit types,
# head_dim 128, 2 query heads a KV head, blocks of 16). Few sequences are a matter of latency: one kernel instead of
# two, and up to 4 one tile a program, loaded before the kernel before ended. Then bandwidth counts: as many programs of
# one warp run at a time as a multiprocessor has registers for, and the projection's part of the work, which takes
# registers, is better done by a kernel of its own.
DECODE = (
    (4, DecodeSettings(block_n=32, num_warps=2, num_stages=1, waves=4, least=1, projects=True)),
    (8, DecodeSettings(block_n=16, num_warps=1, num_stages=2, waves=4, ahead=32, projects=True)),
    (10**9, DecodeSettings(block_n=16, num_warps=1, num_stages=2, waves=8, ahead=32)),
)
# By bytes of a row of keys.
PREFILL = (
    (128, PrefillSettings(block_m=128, block_n=64, num_warps=4, num_stages=3)),
    (256, PrefillSettings(block_m=128, block_n=64, num_warps=8, num_stages=3)),
    (512, PrefillSettings(block_m=64, block_n=64, num_warps=4, num_stages=2)),
    (10**9, PrefillSettings(block_m=32, block_n=16, num_warps=4, num_stages=2)),
)
FLOAT32_PREFILL = PrefillSettings(block_m=32, block_n=16, num_warps=8, num_stages=2)  # more spills registers


def decode_settings(context: AttentionContext, num_seqs: int, shared_memory: int) -> DecodeSettings:
    """Settings for `num_seqs` decoding sequences on a device whose programs get `shared_memory` bytes."""
    settings = next(s for limit, s in DECODE if num_seqs <= limit)
    group = power_of_two(context.num_heads // context.num_kv_heads)
    wider = max(1, row_bytes(context) * max(16, group) // 4096)  # a warp has registers for 16 rows of 256 bytes
    settings = replace(settings, num_warps=settings.num_warps * wider, waves=settings.waves / wider)
    return fit(settings, context, shared_memory)


def prefill_settings(context: AttentionContext, shared_memory: int) -> PrefillSettings:
    """Settings for chunks; a tile must hold at least one query with all its heads."""
    settings = next(s for limit, s in PREFILL if context.head_dim * context.dtype.itemsize <= limit)
    if context.dtype.itemsize == 4:
        settings = FLOAT32_PREFILL
    group = power_of_two(context.num_heads // context.num_kv_heads)
    return fit(replace(settings, block_m=max(settings.block_m, group)), context, shared_memory)


def row_bytes(context: AttentionContext) -> int:
    """Bytes of a head's key, padded as a kernel holds it."""
    return power_of_two(context.head_dim) * context.dtype.itemsize


def power_of_two(number: int) -> int:
    """The least one that is not below `number`; Triton's own would be imported where no kernel is wanted."""
    return 1 << (number - 1).bit_length()


def fit(settings: Settings, context: AttentionContext, shared_memory: int) -> Settings:
    """The same settings with fewer stages, then fewer keys a tile, until the tiles fit."""
    while settings.shared_memory(row_bytes(context)) > shared_memory:
        if settings.num_stages > 2:
            settings = replace(settings, num_stages=settings.num_stages - 1)
        elif settings.block_n > 16:
            settings = replace(settings, block_n=settings.block_n // 2)
        else:
            break
    return settings
