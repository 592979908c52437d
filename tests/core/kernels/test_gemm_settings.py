"""The table of GEMM settings gives what was found on a GPU: for real models entry by entry, elsewhere by a digest.

A change that is meant is written down with `python -m tests.core.kernels.test_gemm_settings`, which prints the digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from itertools import product
from pathlib import Path

from nanoflow.core.kernels.gemm.settings import (
    FILL,
    TABLE,
    GemmConfig,
    GemvConfig,
    SkinnyConfig,
    TiledConfig,
    TmaConfig,
    find_config,
)

GOLDEN = Path(__file__).with_name("gemm_settings.json")
DIGEST = "47ecbd734cdcc1c969b38380dda817ef1f3c9366228218cf83a9870cde632a7d"
NAMES = {GemvConfig: "gemv", SkinnyConfig: "skinny", TiledConfig: "tiled", TmaConfig: "tma"}
# hidden, query heads, KV heads, inner size, size of a head, ranks
MODELS = [
    (1024, 16, 8, 3072, 128, (1,)), (2048, 16, 8, 6144, 128, (1,)), (2560, 32, 8, 9728, 128, (1,)),
    (4096, 32, 8, 12288, 128, (1, 2, 4)), (5120, 40, 8, 17408, 128, (1,)), (5120, 64, 8, 25600, 128, (1, 2, 4)),
]  # fmt: skip
VOCABULARY = 151_936
ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257)
OUTPUTS = (
    33, 1008, 1024, 1025, 2048, 2049, 3071, 3072, 4096, 4112, 4224, 4225, 12287, 12288, 32767, 32768, 65535, 65536,
)  # fmt: skip
SIZES = (16, 24, 48, 240, 256, 512, 1008, 1024, 1040, 2032, 2048, 2064, 3072, 4096, 4112, 4224, 4240, 5120, 8192)


def shapes() -> list[tuple[str, int, int]]:
    """Epilogue, outputs and columns of each GEMM of the models, and of their shards."""
    found = {}
    for hidden, heads, kv_heads, inner, head_dim, ranks in MODELS:
        for size in ranks:
            qkv, out = (heads + 2 * kv_heads) * head_dim // size, heads * head_dim // size
            for epilogue in ("plain", "norm"):
                found[epilogue, qkv, hidden] = None
            for epilogue in ("gate", "norm+gate"):
                found[epilogue, 2 * inner // size, hidden] = None
            for epilogue, columns in product(("split", "residual"), (out, inner // size)):
                found[epilogue, hidden, columns] = None
            found["plain", VOCABULARY // size, hidden] = None
    return list(found)


def described(config: GemmConfig | None) -> str:
    return "cublas" if config is None else " ".join(map(str, (NAMES[type(config)], *astuple(config))))


def by_rows(epilogue: str, outputs: int, size: int) -> list[str]:
    """What is taken, each after the number of rows from which on it is."""
    found, last = [], None
    for rows in range(1, 258):
        if (config := described(find_config(epilogue, rows, outputs, size))) != last:
            found.append(f"{rows}: {config}")
            last = config
    return found


def golden() -> dict[str, list[str]]:
    return {f"{epilogue} {outputs} x {size}": by_rows(epilogue, outputs, size) for epilogue, outputs, size in shapes()}


def digest() -> str:
    """Of all shapes around which something changes."""
    found = hashlib.sha256()
    for shape in product(TABLE, ROWS, OUTPUTS, SIZES):
        found.update(described(find_config(*shape)).encode() + b"\n")
    return found.hexdigest()


def test_gemms_of_models() -> None:
    assert golden() == json.loads(GOLDEN.read_text())


def test_all_other_shapes() -> None:
    assert digest() == DIGEST


def test_no_entry_hides_behind_another() -> None:
    taken = {(e, described(find_config(e, m, n, k))) for e, m, n, k in product(TABLE, ROWS, OUTPUTS, SIZES)}
    for epilogue, entries in TABLE.items():
        for entry in entries:
            if not entry.fit and getattr(entry.config, "splits", 1) != FILL:
                assert (epilogue, described(entry.config)) in taken


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
    print(digest())
