"""The Triton kernels, in Triton's interpreter or on a GPU, against the torch backend."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from nanoflow.core.interfaces import NoOptions
from nanoflow.plugins.attention import nanoflow_attention_backends
from tests.plugins.attention.batches import Case, context, errors, fill, projections

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1 before triton is imported",
)

if not pytestmark.args[0]:
    from nanoflow.plugins.attention.triton_paged import TritonAttention
    from nanoflow.plugins.attention.triton_prefill import list_tiles

MIXES = {
    "decode": ([1, 300, 16, 5, 0], []),
    "chunked": ([], [(40, 0), (7, 33), (130, 20)]),
    "mixed": ([70, 2, 129], [(2, 0), (35, 64)]),
}


def case_of(mix: str, block_size: int, shared: int = 0) -> Case:
    decodes, chunks = MIXES[mix]
    return Case.draw(np.random.default_rng(7), block_size, [n for n in decodes if n], chunks, shared)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"),
    [(1, 64, 16), (2, 128, 16), (2, 64, 64), (4, 128, 32), (8, 64, 256), (8, 128, 128), (3, 80, 16), (16, 32, 64)],
)
def test_against_torch(mix: str, group: int, head_dim: int, block_size: int) -> None:
    c = context(group, head_dim, block_size, device=DEVICE)
    assert max(errors(TritonAttention, NoOptions(), c, case_of(mix, block_size))) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_16_bit(dtype: torch.dtype, bound: float) -> None:
    c = context(2, 64, 16, dtype, DEVICE)
    assert max(errors(TritonAttention, NoOptions(), c, case_of("mixed", 16))) < bound


def test_shared_blocks() -> None:
    c = context(2, 64, 16, device=DEVICE)
    assert max(errors(TritonAttention, NoOptions(), c, case_of("mixed", 16, shared=3))) < 1e-5


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_any_number_of_shares(num_kv_heads: int) -> None:
    """One long sequence over all shares, and many short ones in each."""
    c = context(2, 32, 16, device=DEVICE, num_kv_heads=num_kv_heads, num_layers=1)
    rng = np.random.default_rng(0)
    for decodes in ([700], [3] * 40, [1, 500, 1, 1, 250]):
        assert max(errors(TritonAttention, NoOptions(), c, Case.draw(rng, 16, decodes))) < 1e-5


def test_empty_rows_are_finite() -> None:
    """A captured batch is padded with rows of context 0 or 1."""
    c = context(2, 32, 16, device=DEVICE, num_layers=1)
    case = Case.draw(np.random.default_rng(0), 16, [40, 1, 1])
    backend = TritonAttention(NoOptions(), c)
    backend.allocate(case.num_blocks)
    fill(backend, c, case, torch.Generator().manual_seed(0))
    inputs = case.inputs(16, DEVICE)
    backend.plan(inputs)
    query = projections(c, 3, torch.Generator().manual_seed(0))[0]
    full = backend.attend(0, query).clone()
    inputs.context_lens_S[1:] = torch.tensor([0, 1], dtype=torch.int32)
    out = backend.attend(0, query)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], full[0])


def test_the_cache_takes_what_it_says() -> None:
    backend = TritonAttention(NoOptions(), context(2, 32, 16, device=DEVICE))
    backend.allocate(7)
    tensors = [*backend.keys, *backend.values]
    assert sum(t.nbytes for t in tensors) == 7 * backend.bytes_per_block
    assert all(t.isfinite().all() for t in tensors)
    assert {tuple(t.shape) for layer in range(2) for t in backend.cache(layer)} == {(7, 16, 2, 32)}


def test_tiles_cover_each_query_once_longest_first() -> None:
    query_lens, context_lens = np.array([1, 1, 70, 2, 33]), np.array([9, 4, 100, 50, 33])
    tiles = list_tiles(query_lens, context_lens, 2, 16)
    covered = sorted(place for _, first, count, _ in tiles.tolist() for place in range(first, first + count))
    assert covered == list(range(105))
    assert (np.diff(tiles[:, 3]) <= 0).all()
    for seq, first, _, seen in tiles.tolist():
        start = query_lens[2:seq].sum()
        assert seen == context_lens[seq] - query_lens[seq] + (first - start) + 1


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"block_size": 24}, "power of two from 16 on, not 24"), ({"block_size": 8}, "not 8"),
        ({"head_dim": 512}, "not 512"), ({"dtype": torch.float64}, "not torch.float64"), ({}, None),
    ],
)  # fmt: skip
def test_supports(changes: dict, part: str | None) -> None:
    component = next(c for c in nanoflow_attention_backends() if c.name == "triton")
    values = {"group": 2, "head_dim": 64, "block_size": 16, "device": DEVICE} | changes
    reason = component.supports(NoOptions(), context(**values))
    assert (reason is None) if part is None else (reason is not None and part in reason)


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert next(c for c in nanoflow_attention_backends() if c.name == "triton").priority < 0
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert next(c for c in nanoflow_attention_backends() if c.name == "triton").priority > 0
