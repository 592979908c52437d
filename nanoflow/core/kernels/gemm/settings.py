"""Which kernel computes a GEMM, and how: one table, by rows of x (M), rows of W (N), columns (K) and epilogue.

What has no entry is left to cuBLAS, or made in two operations where the epilogue was to be fused. The entries of an
epilogue are looked through from the first to the last, and the first that fits is taken.

Comments say where an entry was found: the shapes of which model (Qwen3), on an H100 in bfloat16 unless another card is
named, with `benchmarks/kernels.py --tune` or by the experiments of docs/experiments.md. "In a step": inside a whole
decode step in a CUDA graph, one GEMM changed at a time. "By itself": launches of one GEMM in a row. Neighbours matter:
a kernel that leaves no shared memory for the next one's programs keeps them from starting early.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

HEAD = 2**15  # outputs, or more, are taken for a shard of the vocabulary
LARGE = 2**24  # weights, or more, as the GEMMs of 8B have
MOST_ROWS = 256  # beyond, cuBLAS is faster
SPLIT_PROGRAMS = 128  # programs that `FILL` makes at least, of 132 multiprocessors
FILL = 0  # in place of splits: as many as make so many programs


@dataclass(frozen=True)
class GemvConfig:
    """How to run the GEMV kernel, for one row of x: `rows` of W a program, `columns` of them at a time."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class SkinnyConfig:
    """How to run the skinny GEMM, for 2 to 8 rows of x: `rows` of W a program, at least 16, whose columns warps share.

    With `splits`, so many programs share the columns first.
    """

    rows: int
    num_warps: int
    splits: int = 1


@dataclass(frozen=True)
class TileConfig:
    """How a GEMM is cut into programs.

    Attributes:
        tokens: rows of x a program, a power of two from 16 on; from 64 on, Hopper's own matrix instructions are used.
        rows: of W a program, at least 16.
        columns: of both at a time.
        splits: programs that share the columns of a row (split K); more than one leave partials.
        num_warps: of a program.
        num_stages: of the pipeline of loads.
    """

    tokens: int
    rows: int
    columns: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TiledConfig(TileConfig):
    """How to run the tiled GEMM, for up to 64 rows of x.

    Attributes:
        prefetch: whether a program asks for its part of W before the kernel before has ended.
    """

    prefetch: bool = False


@dataclass(frozen=True)
class TmaConfig(TileConfig):
    """How to run the TMA GEMM, for 65 to 256 rows of x."""


GemmConfig = GemvConfig | SkinnyConfig | TiledConfig | TmaConfig
Epilogue = Literal["plain", "split", "gate", "norm", "norm+gate", "residual"]
Range = tuple[int, int]  # the first and the last number
ANY: Range = (0, 2**62)


def upto(last: int) -> Range:
    return 0, last


def beyond(number: int) -> Range:
    return number + 1, ANY[1]


class Entry(NamedTuple):
    """What to take for some shapes; None for cuBLAS.

    Attributes:
        rows: M.
        config: see there; `FILL` may stand for its splits.
        outputs: N; with a gate those of both halves.
        size: K.
        weights: N times K.
        multiple: what K is a multiple of.
        wide: whether N is no less than K.
        fit: whether the columns are no more than K needs, a power of two.
    """

    rows: Range
    config: GemmConfig | None
    outputs: Range = ANY
    size: Range = ANY
    weights: Range = ANY
    multiple: int = 16
    wide: bool = False
    fit: bool = False


GEMV, SKINNY = (1, 1), (2, 8)  # rows of x
IS_LARGE, IS_SMALL, IS_HEAD = (LARGE, ANY[1]), upto(LARGE - 1), (HEAD, ANY[1])

# GEMV without a norm before it, also with the residual added behind it. Models of 0.6B to 14B, and the shards of 8B and
# 32B over up to 4 ranks. The residual in the kernel: 0.705 to 0.688 ms a step of 0.6B.
GEMV_PLAIN = (
    Entry(GEMV, GemvConfig(rows=2, columns=2048, num_warps=4), outputs=upto(1024), size=(2048, 2048)),
    Entry(GEMV, GemvConfig(rows=2, columns=4096, num_warps=4), outputs=upto(1024), fit=True),
    Entry(GEMV, GemvConfig(rows=2, columns=1024, num_warps=4), outputs=IS_HEAD, size=upto(1024), fit=True),
    Entry(GEMV, GemvConfig(rows=4, columns=512, num_warps=4), size=upto(1024)),
    Entry(GEMV, GemvConfig(rows=1, columns=2048, num_warps=4), outputs=upto(2048), multiple=4096),
    Entry(GEMV, GemvConfig(rows=2, columns=4096, num_warps=4), multiple=4096),
    Entry(GEMV, GemvConfig(rows=2, columns=1024, num_warps=4)),
)
# Skinny GEMM of QKV and gate-up, with or without the norm. In a step of 0.6B, on an H100, and on an H200 before.
SKINNY_PLAIN = (Entry(SKINNY, SkinnyConfig(rows=32, num_warps=4), outputs=upto(2**16 - 1), size=(256, 1024)),)
SKINNY_GATE = (
    Entry((3, 4), SkinnyConfig(rows=16, num_warps=1), outputs=upto(2**16 - 1), size=(256, 1024)),
    Entry(SKINNY, SkinnyConfig(rows=16, num_warps=4), outputs=upto(2**16 - 1), size=(256, 1024)),
)
# The head. In a step of 0.6B and 8B.
TILED_HEAD = (
    Entry((2, 16), TiledConfig(16, rows=32, columns=128, splits=1, num_warps=4, num_stages=6), IS_HEAD),
    Entry((17, 32), TiledConfig(32, rows=32, columns=128, splits=1, num_warps=4, num_stages=6), IS_HEAD),
    Entry((33, 64), TiledConfig(64, rows=64, columns=64, splits=1, num_warps=4, num_stages=6), IS_HEAD),
)

TABLE: dict[Epilogue, tuple[Entry, ...]] = {
    # QKV and the head behind a norm's own kernel, and all that is not fused: x Wᵀ + b.
    "plain": (
        *GEMV_PLAIN,
        *SKINNY_PLAIN,
        *TILED_HEAD,
        # Too few programs of 32 rows for the multiprocessors. By itself, QKV of ranks of four.
        Entry((2, 64), None, outputs=(1025, 3071), size=beyond(1024)),
        # In a step of 0.6B and 8B.
        Entry((2, 16), TiledConfig(64, rows=32, columns=128, splits=1, num_warps=4, num_stages=4), weights=IS_LARGE),
        Entry((2, 16), TiledConfig(16, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)),
        Entry((17, 64), TiledConfig(64, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)),
        # In a step of 8B: 2.0 to 3.3 % faster up to M = 128; at 256 cuBLAS makes a step 0.3 to 3 % faster.
        Entry((65, 128), TmaConfig(128, rows=128, columns=128, splits=1, num_warps=8, num_stages=3), IS_HEAD,
              weights=IS_LARGE, multiple=64),
        Entry((65, 128), TmaConfig(128, rows=64, columns=128, splits=1, num_warps=4, num_stages=4), weights=IS_LARGE,
              multiple=64),
        # In a step of 0.6B: 96 / 128 / 192 / 256 sequences 1.5 / 1.3 / 1.7 / 0.9 % faster than with cuBLAS.
        Entry((129, 256), TmaConfig(64, rows=128, columns=128, splits=1, num_warps=4, num_stages=4),
              size=upto(2048), weights=IS_SMALL, multiple=64),
        Entry((65, 128), TmaConfig(64, rows=64, columns=128, splits=1, num_warps=4, num_stages=6),
              size=upto(2048), weights=IS_SMALL, multiple=64),
    ),
    # Output projection and down, whose partials the next norm adds up: the result may be split-K partials.
    "split": (
        *GEMV_PLAIN,
        # Down of 0.6B, in a step: 2 / 3 / 4 / 8 sequences 5.4 / 3.5 / 1.0 / 1.8 % faster.
        Entry((2, 4), SkinnyConfig(rows=32, num_warps=2, splits=6), outputs=upto(1024), size=(3072, 3072)),
        Entry((5, 8), SkinnyConfig(rows=32, num_warps=4, splits=6), outputs=upto(1024), size=(3072, 3072)),
        *TILED_HEAD,
        # More programs of 32 rows, one a multiprocessor, than there are. By itself, 32B at M = 64: 56 to 37 µs.
        Entry((2, 64), None, outputs=beyond(4224)),
        # In a step of 8B: the output projection (K = N), then down.
        Entry((2, 16), TiledConfig(16, rows=16, columns=256, splits=2, num_warps=2, num_stages=4), weights=IS_LARGE,
              wide=True),
        Entry((2, 16), TiledConfig(64, rows=32, columns=128, splits=2, num_warps=4, num_stages=4), weights=IS_LARGE),
        # In a step of 0.6B and 8B; by itself for ranks of four of 8B and 32B.
        Entry((2, 64), TiledConfig(64, rows=32, columns=128, splits=FILL, num_warps=4, num_stages=6, prefetch=True)),
        # In a step of 0.6B; by itself for ranks of four of 8B, which from M = 129 on leave N > 1024 to cuBLAS (61 to 33
        # µs a layer at M = 256, without gate-up).
        Entry((129, 256), TmaConfig(64, rows=64, columns=128, splits=2, num_warps=4, num_stages=4),
              outputs=upto(1024), weights=IS_SMALL, multiple=64),
        Entry((65, 128), TmaConfig(64, rows=32, columns=256, splits=2, num_warps=4, num_stages=4),
              outputs=upto(1024), weights=IS_SMALL, multiple=64),
        Entry((65, 128), TmaConfig(64, rows=32, columns=256, splits=1, num_warps=4, num_stages=4),
              outputs=upto(2048), weights=IS_SMALL, multiple=64),
    ),
    # Gate-up: SiLU of one half of the outputs times the other half.
    "gate": (
        # As `GEMV_PLAIN`, where K is no reason for more columns. By itself, 12800 x 5120 of 32B: 54.3 to 44.2 µs.
        Entry(GEMV, GemvConfig(rows=2, columns=2048, num_warps=4), outputs=upto(1024), size=(2048, 2048)),
        Entry(GEMV, GemvConfig(rows=2, columns=4096, num_warps=4), outputs=upto(1024), fit=True),
        Entry(GEMV, GemvConfig(rows=2, columns=1024, num_warps=4), outputs=IS_HEAD, size=upto(1024), fit=True),
        Entry(GEMV, GemvConfig(rows=4, columns=512, num_warps=4), size=upto(1024)),
        Entry(GEMV, GemvConfig(rows=2, columns=1024, num_warps=4)),
        *SKINNY_GATE,
        # By itself, 32B.
        Entry((2, 16), TiledConfig(16, rows=32, columns=256, splits=1, num_warps=4, num_stages=4), size=beyond(4096)),
        Entry((17, 64), TiledConfig(64, rows=64, columns=128, splits=1, num_warps=4, num_stages=4), size=beyond(4096)),
        # In a step of 0.6B and 8B.
        Entry((2, 16), TiledConfig(16, rows=32, columns=128, splits=1, num_warps=4, num_stages=6), weights=IS_LARGE),
        Entry((2, 16), TiledConfig(64, rows=32, columns=128, splits=1, num_warps=4, num_stages=6)),
        Entry((17, 64), TiledConfig(64, rows=32, columns=128, splits=1, num_warps=4, num_stages=4)),
        # In a step of 8B up to M = 128.
        Entry((65, 128), TmaConfig(128, rows=32, columns=64, splits=1, num_warps=4, num_stages=3),
              outputs=beyond(12287), weights=IS_LARGE, multiple=64),
        # In a step of 0.6B.
        Entry((129, 256), TmaConfig(64, rows=32, columns=64, splits=1, num_warps=4, num_stages=4),
              size=upto(1024), weights=IS_SMALL, multiple=64),
        Entry((65, 128), TmaConfig(64, rows=64, columns=128, splits=1, num_warps=4, num_stages=4),
              size=upto(1024), weights=IS_SMALL, multiple=64),
    ),
    # RMSNorm before QKV, in the same kernel. GEMV: in a step, programs of one warp make that of 0.6B 0.686 to 0.630 ms;
    # with what is here steps of 1.7B / 4B / 8B / 14B are 2.8 / 9.4 / 1.3 / 5.4 % faster.
    "norm": (
        Entry(GEMV, GemvConfig(rows=4, columns=512, num_warps=1), size=upto(1024)),
        Entry(GEMV, GemvConfig(rows=2, columns=1024, num_warps=4)),
        *SKINNY_PLAIN,
    ),
    # The same before gate-up.
    "norm+gate": (
        Entry(GEMV, GemvConfig(rows=2, columns=512, num_warps=1), size=upto(2048)),
        Entry(GEMV, GemvConfig(rows=1, columns=1024, num_warps=4)),
        *SKINNY_GATE,
    ),
    # Output projection and down, added to the residual in the same kernel. Skinny: the output projection of 0.6B, in a
    # step 2 to 3 % faster with 3 and 8 rows, but 1.2 % slower with two (2.4 % on an H200).
    "residual": (
        *GEMV_PLAIN,
        Entry((3, 4), SkinnyConfig(rows=32, num_warps=8), outputs=upto(2**16 - 1), size=(256, 2048)),
        Entry((5, 8), SkinnyConfig(rows=16, num_warps=8), outputs=upto(2**16 - 1), size=(256, 2048)),
    ),
}  # fmt: skip


def find_config(epilogue: Epilogue, num_rows: int, num_outputs: int, size: int) -> GemmConfig | None:
    """How to compute a GEMM [M, K] x [N, K]ᵀ; None for cuBLAS, or for two operations.

    Args:
        epilogue: what stands around it in the same kernel.
        num_rows: M.
        num_outputs: N; with a gate those of both halves.
        size: K.
    """
    return _find(epilogue, num_rows, num_outputs, size) if num_rows <= MOST_ROWS else None


@functools.cache  # steps that are not captured ask at every launch
def _find(epilogue: Epilogue, num_rows: int, num_outputs: int, size: int) -> GemmConfig | None:
    for entry in TABLE[epilogue]:
        if (
            _within(num_rows, entry.rows)
            and _within(num_outputs, entry.outputs)
            and _within(size, entry.size)
            and _within(num_outputs * size, entry.weights)
            and size % 16 == size % entry.multiple == 0
            and (num_outputs >= size or not entry.wide)
        ):
            return _filled_in(entry, num_outputs, size)
    return None


def _within(number: int, bounds: Range) -> bool:
    return bounds[0] <= number <= bounds[1]


def _filled_in(entry: Entry, num_outputs: int, size: int) -> GemmConfig | None:
    config = entry.config
    if isinstance(config, GemvConfig) and entry.fit:
        return replace(config, columns=min(config.columns, 1 << (size - 1).bit_length()))
    if isinstance(config, TileConfig) and config.splits == FILL:
        return replace(config, splits=-(-SPLIT_PROGRAMS // -(-num_outputs // config.rows)))
    return config
