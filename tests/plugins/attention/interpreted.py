"""The Triton backend in Triton's interpreter against the torch backend. `test_triton.py` runs this file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanoflow.core.interfaces import NoOptions
from nanoflow.plugins.attention import triton_settings
from nanoflow.plugins.attention.triton_paged import TritonAttention
from nanoflow.plugins.attention.triton_prefill import TritonPrefill
from nanoflow.plugins.attention.triton_settings import DecodeSettings, PrefillSettings
from tests.plugins.attention.batches import Case, context, errors, fill, projected_errors, projections

MIXES = {
    "decode": ([1, 300, 16, 5, 0], []),
    "chunked": ([], [(40, 0), (7, 33), (70, 20)]),
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
    c = context(group, head_dim, block_size)
    assert max(errors(TritonAttention, NoOptions(), c, case_of(mix, block_size))) < 1e-5


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(1, 64, 16), (2, 128, 16), (8, 64, 256), (3, 80, 16), (16, 32, 64)]
)
def test_projections(normed: bool, group: int, head_dim: int, block_size: int) -> None:
    """Normed, rotated, stored and attended to in one; contexts of one token and ends on a tile's and block's edge."""
    c = context(group, head_dim, block_size)
    for decodes in ([1, 300, 16, 17, 5, 128, 129, 257], [1], [700]):
        case = Case.draw(np.random.default_rng(3), block_size, decodes)
        assert max(projected_errors(TritonAttention, NoOptions(), c, case, normed=normed)) < 1e-5


@pytest.mark.parametrize("window", [1, 16, 17, 40])
def test_windows(window: int) -> None:
    """Beside a layer without one; windows within a tile, on its edge, and over several."""
    c = context(2, 32, 16, windows=(window, None))
    assert max(errors(TritonAttention, NoOptions(), c, case_of("mixed", 16))) < 1e-5
    c = context(2, 32, 16, windows=(window,), num_layers=1)
    for decodes in ([1, 16, 17, 5, 129], [33]):
        case = Case.draw(np.random.default_rng(3), 16, decodes)
        assert max(projected_errors(TritonAttention, NoOptions(), c, case, normed=True)) < 1e-5, decodes


@pytest.mark.parametrize(("least", "window"), [(0, None), (1, None), (3, None), (0, 50), (3, 50)])
@pytest.mark.parametrize("decodes", [[700], [3] * 5, [1, 500, 1, 90, 250]])
def test_shares_of_any_size(
    decodes: list[int], least: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DecodeSettings(block_n=32, num_warps=4, num_stages=2, waves=4, least=least, projects=True)
    monkeypatch.setattr(triton_settings, "DECODE", ((10**9, settings),))
    c = context(2, 32, 16, num_layers=1, windows=(window,))
    case = Case.draw(np.random.default_rng(0), 16, decodes)
    assert max(errors(TritonAttention, NoOptions(), c, case)) < 1e-5
    assert max(projected_errors(TritonAttention, NoOptions(), c, case, normed=True)) < 1e-5


def test_tiles_cover_each_query_once() -> None:
    c = context(2, 32, 16)
    case = Case.draw(np.random.default_rng(0), 16, [9, 4], [(70, 30), (2, 48), (33, 0)])
    prefiller = TritonPrefill(c, PrefillSettings(block_m=32, block_n=16, num_warps=4, num_stages=2))
    for beside_decodes, expected in ((True, range(2, 107)), (False, range(107))):
        tiles = prefiller.tiles(case.inputs(16), beside_decodes=beside_decodes).tolist()
        covered = [place for _, first, count, _ in tiles for place in range(first, first + count)]
        assert sorted(covered) == list(expected)
        for seq, first, count, seen in tiles:
            if count:
                start = case.query_lens[:seq].sum()
                assert seen == case.context_lens[seq] - case.query_lens[seq] + (first - start) + 1


@pytest.mark.parametrize("mix", MIXES)
def test_sequences_without_tokens(mix: str) -> None:
    """A captured step ends with sequences that have no tokens."""
    c = context(2, 32, 16, num_layers=1)
    case = case_of(mix, 16)
    generator = torch.Generator().manual_seed(1)
    backend = TritonAttention(NoOptions(), c)
    backend.allocate(case.num_blocks)
    fill(backend, c, case, torch.Generator().manual_seed(0))
    query = projections(c, int(case.query_lens.sum()), generator)[0]
    inputs = case.inputs(16)
    backend.plan(inputs)
    expected = backend.attend(0, query).clone()
    more = 3
    inputs.query_start_S1 = torch.cat((inputs.query_start_S1, inputs.query_start_S1[-1:].repeat(more)))
    inputs.context_lens_S = torch.cat((inputs.context_lens_S, torch.ones(more, dtype=torch.int32)))
    inputs.block_tables_SB = torch.cat((inputs.block_tables_SB, inputs.block_tables_SB[:1].repeat(more, 1)))
    inputs.query_lens = np.full(len(case.query_lens) + more, 99)
    inputs.context_lens = np.full(len(case.query_lens) + more, 99)
    inputs.num_decodes = 0
    backend.plan(inputs)
    torch.testing.assert_close(backend.attend(0, query), expected)


def test_float16() -> None:
    """Not bfloat16, of which the interpreter's `tl.dot` multiplies the bit patterns."""
    c = context(2, 64, 16, torch.float16)
    assert max(errors(TritonAttention, NoOptions(), c, case_of("mixed", 16))) < 2e-3


def test_shared_blocks() -> None:
    c = context(2, 64, 16)
    assert max(errors(TritonAttention, NoOptions(), c, case_of("mixed", 16, shared=3))) < 1e-5


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_any_number_of_shares(num_kv_heads: int) -> None:
    """One long sequence over all shares, and many short ones in each."""
    c = context(2, 32, 16, num_kv_heads=num_kv_heads, num_layers=1)
    rng = np.random.default_rng(0)
    for decodes in ([700], [3] * 40, [1, 500, 1, 1, 250]):
        assert max(errors(TritonAttention, NoOptions(), c, Case.draw(rng, 16, decodes))) < 1e-5


def test_empty_rows_are_finite() -> None:
    """A captured batch is padded with rows of context 0 or 1."""
    c = context(2, 32, 16, num_layers=1)
    case = Case.draw(np.random.default_rng(0), 16, [40, 1, 1])
    backend = TritonAttention(NoOptions(), c)
    backend.allocate(case.num_blocks)
    fill(backend, c, case, torch.Generator().manual_seed(0))
    inputs = case.inputs(16)
    backend.plan(inputs)
    query = projections(c, 3, torch.Generator().manual_seed(0))[0]
    full = backend.attend(0, query).clone()
    inputs.context_lens_S[1:] = torch.tensor([0, 1], dtype=torch.int32)
    backend.plan(inputs)
    out = backend.attend(0, query)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], full[0])


def test_the_cache_takes_what_it_says() -> None:
    backend = TritonAttention(NoOptions(), context(2, 32, 16))
    backend.allocate(7)
    tensors = [*backend.keys, *backend.values]
    assert sum(t.nbytes for t in tensors) == 7 * backend.bytes_per_block
    assert all(t.isfinite().all() for t in tensors)
    assert {tuple(t.shape) for layer in range(2) for t in backend.cache(layer)} == {(7, 16, 2, 32)}
