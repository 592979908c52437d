"""The paged PyTorch backend against attention written out token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.core.interfaces import AttentionBackend, AttentionContext, NoOptions
from nanoflow.core.types import AttentionInput
from nanoflow.plugins.attention.torch_paged import PADDING_TOKENS, TorchAttention, similar

HEADS = [(4, 4), (4, 2), (4, 1), (8, 1), (6, 3)]


def context(
    num_heads: int = 4, num_kv_heads: int = 2, block_size: int = 4, dtype: torch.dtype = torch.float32,
    windows: tuple[int | None, ...] = (),
) -> AttentionContext:  # fmt: skip
    return AttentionContext(
        num_layers=2, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, scale=0.3, block_size=block_size,
        dtype=dtype, device=torch.device("cpu"), windows=windows,
    )  # fmt: skip


@dataclass
class Case:
    """A batch: what is new in each sequence, what came before, and where it all lies."""

    query_lens: list[int]
    context_lens: list[int]
    tables: list[list[int]]
    num_blocks: int

    def inputs(self, block_size: int) -> AttentionInput:
        slots = [
            table[position // block_size] * block_size + position % block_size
            for table, new, length in zip(self.tables, self.query_lens, self.context_lens, strict=True)
            for position in range(length - new, length)
        ]
        widest = max(map(len, self.tables))
        tables = [table + [0] * (widest - len(table)) for table in self.tables]
        return AttentionInput(
            slot_mapping_T=torch.tensor(slots),
            query_start_S1=torch.tensor([0, *np.cumsum(self.query_lens)], dtype=torch.int32),
            context_lens_S=torch.tensor(self.context_lens, dtype=torch.int32),
            block_tables_SB=torch.tensor(tables, dtype=torch.int32),
            query_lens=np.array(self.query_lens),
            context_lens=np.array(self.context_lens),
            num_decodes=next((i for i, n in enumerate(self.query_lens) if n > 1), len(self.query_lens)),
        )


@dataclass
class Stored:
    """What the reference keeps: keys and values of each slot in float64."""

    keys: torch.Tensor
    values: torch.Tensor


def attend(
    case: Case, stored: Stored, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, c: AttentionContext,
    window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Each token's attention by itself, in float64."""
    size, repeat = c.block_size, c.num_heads // c.num_kv_heads
    slots = case.inputs(size).slot_mapping_T
    stored.keys[slots], stored.values[slots] = key.double(), value.double()
    outputs, token = [], 0
    for table, new, length in zip(case.tables, case.query_lens, case.context_lens, strict=True):
        for position in range(length - new, length):
            seen = [table[p // size] * size + p % size for p in range(position + 1)]
            seen = seen if window is None else seen[-window:]
            keys, values = (t[seen].repeat_interleave(repeat, dim=1) for t in (stored.keys, stored.values))
            scores = torch.einsum("nh,lnh->nl", query[token].double(), keys) * c.scale
            outputs.append(torch.einsum("nl,lnh->nh", scores.softmax(-1), values))
            token += 1
    return torch.stack(outputs)


def draw_case(rng: np.random.Generator, block_size: int, num_seqs: int) -> Case:
    """Decodes first, then chunks; half of the sequences share leading full blocks with the first."""
    query_lens = np.sort(rng.choice([1, 1, 1, 2, 5, 9, 17], num_seqs)).tolist()
    context_lens = [new + int(rng.integers(0, 40)) for new in query_lens]
    free = list(rng.permutation(num_seqs * 20 * (1 if block_size > 3 else 4)))
    tables: list[list[int]] = []
    for new, length in zip(query_lens, context_lens, strict=True):
        shared = min((length - new) // block_size, len(tables[0])) if tables and rng.random() < 0.5 else 0
        if tables:
            shared = min(shared, (context_lens[0] - query_lens[0]) // block_size)
        own = [int(free.pop()) for _ in range(-(-length // block_size) - shared)]
        tables.append((tables[0][:shared] if shared else []) + own)
    return Case(query_lens, context_lens, tables, num_seqs * 80)


def compare(case: Case, c: AttentionContext, rng: np.random.Generator, tolerance: float) -> None:
    """Fill the cache with random past, run the batch through both layers, and compare."""
    backend = TorchAttention(NoOptions(), c)
    backend.allocate(case.num_blocks)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(c.dtype)

    num_slots, past = case.num_blocks * c.block_size, []
    for layer in range(c.num_layers):
        keys, values = random(num_slots, c.num_kv_heads, c.head_dim), random(num_slots, c.num_kv_heads, c.head_dim)
        for cache, content in zip(backend.cache(layer), (keys, values), strict=True):
            assert cache.shape == (case.num_blocks, c.block_size, c.num_kv_heads, c.head_dim)
            cache.copy_(content.view(cache.shape))
        past.append(Stored(keys.double(), values.double()))
    backend.plan(case.inputs(c.block_size))
    num_tokens = sum(case.query_lens)
    for layer in range(c.num_layers):
        # As a model has them: parts of one fused projection, so that their rows are strided.
        sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        query, key, value = random(num_tokens, sum(sizes), c.head_dim).split(sizes, dim=1)
        out = backend.forward(layer, query, key, value)
        expected = attend(case, past[layer], query, key, value, c, c.window(layer))
        assert (out.shape, out.dtype) == (query.shape, c.dtype)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        for cache, stored in zip(backend.cache(layer), (past[layer].keys, past[layer].values), strict=True):
            assert torch.equal(cache.double().view(stored.shape), stored), "exactly the new slots were written"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@given(seed=st.integers(0, 10**9), block_size=st.sampled_from([1, 3, 4, 16]), num_seqs=st.integers(1, 8))
def test_random_batches(num_heads: int, num_kv_heads: int, seed: int, block_size: int, num_seqs: int) -> None:
    rng = np.random.default_rng(seed)
    compare(draw_case(rng, block_size, num_seqs), context(num_heads, num_kv_heads, block_size), rng, 1e-5)


@pytest.mark.parametrize("windows", [(1, None), (None, 3), (4, 5), (16, 16), (10, 100)])
@given(seed=st.integers(0, 10**9), block_size=st.sampled_from([1, 4, 16]), num_seqs=st.integers(1, 8))
def test_windows(windows: tuple[int | None, ...], seed: int, block_size: int, num_seqs: int) -> None:
    rng = np.random.default_rng(seed)
    compare(draw_case(rng, block_size, num_seqs), context(block_size=block_size, windows=windows), rng, 1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
def test_dtypes(num_heads: int, num_kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    compare(draw_case(rng, 4, 12), context(num_heads, num_kv_heads, 4, dtype), rng, tolerance)


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]), ([1], [4]), ([1], [5]), ([7], [7]), ([7], [12]), ([1, 1, 1], [3, 3, 3]), ([1, 1], [1, 700]),
        ([1, 1, 1], [5, 300, 9]), ([1, 5, 1], [4, 5, 9]), ([3, 3], [3, 600]), ([2, 1], [2, 1]),
    ],
)  # fmt: skip
def test_shapes(query_lens: list[int], context_lens: list[int]) -> None:
    """Alone or together, similar or not, one-token chunks after longer ones too."""
    tables, first = [], 0
    for length in context_lens:
        tables.append(list(range(first, first + -(-length // 4))))
        first += len(tables[-1])
    compare(Case(query_lens, context_lens, tables, first), context(), np.random.default_rng(0), 1e-5)


def test_a_block_filled_in_this_step_by_another_sequence() -> None:
    """The second sequence attends to what the first one stores in the same step, though it comes first in the batch."""
    case = Case([1, 6], [5, 6], [[0, 9], [0, 1]], 10)
    compare(case, context(), np.random.default_rng(0), 1e-5)


def test_the_cache_takes_what_it_says() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        backend = TorchAttention(NoOptions(), context(dtype=dtype))
        backend.allocate(7)
        tensors = [*backend.keys, *backend.values]
        assert sum(t.numel() * t.element_size() for t in tensors) == 7 * backend.bytes_per_block
        assert all(t.isfinite().all() for t in tensors)
        assert len({t.data_ptr() for t in tensors}) == 4


def test_storing_as_the_interface_does_it() -> None:
    """The backend's own `store` and the one that it overrides put everything into the same places."""
    case = draw_case(np.random.default_rng(2), 4, 6)
    key, value = torch.randn(2, sum(case.query_lens), 2, 8)
    backends = [TorchAttention(NoOptions(), context()) for _ in range(2)]
    for backend, store in zip(backends, (TorchAttention.store, AttentionBackend.store), strict=True):
        backend.allocate(case.num_blocks)
        backend.plan(case.inputs(4))
        store(backend, 1, key, value)
    for own, inherited in zip(backends[0].cache(1), backends[1].cache(1), strict=True):
        assert own.count_nonzero() == key.numel()
        assert torch.equal(own, inherited)
    assert backends[0].cache(0)[0].count_nonzero() == 0


def test_two_backends_share_nothing() -> None:
    one, two = (TorchAttention(NoOptions(), replace(context())) for _ in range(2))
    one.allocate(2)
    two.allocate(2)
    one.keys[0].fill_(1.0)
    assert two.keys[0].sum() == 0


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 1, 2, 7]), st.integers(0, 3000)), min_size=1, max_size=60),
    max_tokens=st.integers(1, 20_000),
)
def test_grouping(rows: list[tuple[int, int]], max_tokens: int) -> None:
    query_lens = np.array([new for new, _ in rows])
    context_lens = query_lens + np.array([past for _, past in rows])
    groups = similar(query_lens, context_lens, max_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows))), "each sequence is in exactly one group"
    for group in groups:
        longest = context_lens[group].max()
        assert len(set(query_lens[group].tolist())) == 1
        assert longest * len(group) - context_lens[group].sum() <= PADDING_TOKENS
        assert len(group) == 1 or longest * len(group) <= max_tokens


def test_equal_lengths_make_one_group() -> None:
    (group,) = similar(np.full(200, 1), np.full(200, 50), 10**6)
    assert sorted(group.tolist()) == list(range(200))
    assert len(similar(np.full(200, 1), np.full(200, 50), 50 * 50)) == 4
