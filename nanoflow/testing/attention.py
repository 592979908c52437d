"""What every attention backend must do: the numbers of attention written out, and nothing else written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.core.layers import apply_rotary
from nanoflow.testing.batches import (
    GARBAGE,
    Case,
    causal_mask,
    context,
    distance,
    fill,
    poison,
    projections,
    written_out,
)
from nanoflow.testing.suite import Suite

Shape = tuple[int, int, int]
Windows = tuple[int | None, ...]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (context lengths of decodes, (new tokens, tokens before them) of chunks)
MIXES: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "decodes": ([1, 300, 16, 17, 5, 128], []),
    "chunks": ([], [(40, 0), (7, 33), (70, 20)]),
    "mixed": ([70, 2, 129], [(2, 0), (35, 64)]),
}
CORNERS: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "one_token": ([1], []),
    "long_decode": ([700], []),
    "twins": ([40] * 12, []),
    "one_prompt": ([], [(17, 0)]),
    "one_token_chunks": ([5], [(3, 0), (1, 0), (2, 9), (1, 30)]),
    "many": (list(range(1, 120, 4)), [(2, 6), (3, 9), (5, 60)]),
}
every_mix = pytest.mark.parametrize("mix", MIXES)
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
graph_windows = pytest.mark.parametrize("windows", [(), (None, 300)], ids=["unbounded", "window"])
graph_shapes = pytest.mark.parametrize("shape", [(2, 128, 16), (2, 128, 256)], ids=["blocks_of_16", "blocks_of_256"])


class AttentionBackendSuite(Suite):
    """The backend on a GPU if there is one, else on the CPU, in what its `supports` allows of the shapes and dtypes.

    Attributes:
        shapes: (query heads a KV head, head dim, block size) to try.
        bounds: dtypes to try, and the largest ‖out - exact‖ / ‖exact‖ in each.
        garbage: what lies in the cache where no context is. A backend that multiplies what it masks by zero needs a
            finite number here; then NaN that a request leaves in a block may reach the next one that gets the block.
    """

    role = "attention"
    garbage: ClassVar[float] = GARBAGE
    shapes: ClassVar[list[Shape]] = [
        (1, 64, 16), (2, 128, 16), (2, 64, 64), (4, 128, 32), (8, 64, 256), (8, 128, 128), (3, 80, 16), (7, 32, 64),
        (1, 256, 16), (2, 8, 1), (4, 8, 3),
    ]  # fmt: skip
    bounds: ClassVar[dict[torch.dtype, float]] = {
        torch.float32: 1e-5 if DEVICE.type == "cpu" else 1e-3,  # a GPU may round factors to TF32
        torch.float16: 1e-2,
        torch.bfloat16: 1e-2,
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        given = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[:1]}
        if "shape" in metafunc.fixturenames and "shape" not in given:
            metafunc.parametrize("shape", self.shapes, ids=lambda shape: "x".join(map(str, shape)))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.bounds, ids=lambda dtype: str(dtype).removeprefix("torch."))

    @classmethod
    def build(cls, c: AttentionContext, num_blocks: int) -> AttentionBackend:
        """The backend under test, with a cache; skips the test where it does not serve these shapes."""
        component, config = cls.plugin()
        if reason := component.supports(config, c):
            pytest.skip(reason)
        backend: AttentionBackend = component.build(config, c)
        backend.allocate(num_blocks)
        return backend

    @classmethod
    def any_context(cls, **changes: Any) -> AttentionContext:
        """The first of the shapes and dtypes that it serves."""
        component, config = cls.plugin()
        reasons = []
        for dtype in cls.bounds:
            for shape in cls.shapes:
                c = context(*shape, dtype, DEVICE)
                if (reason := component.supports(config, c)) is None:
                    return replace(c, **changes)
                reasons.append(reason)
        pytest.skip(f"it serves none of the shapes here: {reasons[0]}")

    def reference_mask(
        self, c: AttentionContext, layer: int, query_positions_Q: torch.Tensor, key_positions_L: torch.Tensor
    ) -> torch.Tensor:
        """Which keys of a sequence each of its queries sees, bool [Q, L]; every query sees at least one.

        Causal attention within the layer's window. A backend that promises another mask overrides it.
        """
        return causal_mask(c, layer, query_positions_Q, key_positions_L)

    @every_mix
    def test_numbers(self, mix: str, shape: Shape, dtype: torch.dtype) -> None:
        """Each mix of decodes and chunks over cached tokens; of the cache, exactly the new slots are written."""
        c = context(*shape, dtype, DEVICE, num_layers=1)
        self.check(c, Case.draw(np.random.default_rng(7), c.block_size, *MIXES[mix]))

    @pytest.mark.parametrize("corner", CORNERS)
    def test_corners(self, corner: str) -> None:
        c = self.any_context(num_layers=1)
        self.check(c, Case.draw(np.random.default_rng(7), c.block_size, *CORNERS[corner]))

    @every_mix
    def test_shared_blocks(self, mix: str) -> None:
        """Sequences that begin with the same cached blocks."""
        c = self.any_context(num_layers=1)
        self.check(c, Case.draw(np.random.default_rng(3), c.block_size, *MIXES[mix], shared=3))

    @pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
    def test_kv_heads(self, num_kv_heads: int) -> None:
        c = self.any_context(num_layers=1)
        c = replace(c, num_kv_heads=num_kv_heads, num_heads=2 * num_kv_heads)
        self.check(c, Case.draw(np.random.default_rng(0), c.block_size, [1, 50, 7], [(9, 20)]))

    def test_layers(self) -> None:
        """Each has a cache of its own."""
        c = self.any_context(num_layers=3)
        self.check(c, Case.draw(np.random.default_rng(2), c.block_size, [20, 3], [(9, 20)]))

    def test_scale(self) -> None:
        """It is the context's, whatever the head dim."""
        c = self.any_context(scale=0.31, num_layers=1)
        self.check(c, Case.draw(np.random.default_rng(1), c.block_size, [20, 3], [(9, 20)]))

    @pytest.mark.parametrize("window", [1, 16, 17, 40, 4096])
    def test_windows(self, window: int) -> None:
        """Beside a layer without one: within a block, on its edge, over several, and wider than any context."""
        c = self.any_context(windows=(window, None))
        self.check(c, Case.draw(np.random.default_rng(0), c.block_size, [2, 90], [(2, 0), (20, 64)]))
        c = self.any_context(windows=(window,), num_layers=1)
        self.check_projection(c, Case.draw(np.random.default_rng(3), c.block_size, [1, 16, 17, 5, 90]), normed=True)

    def test_a_block_filled_in_this_step_by_another_sequence(self) -> None:
        """The first sequence of the batch attends to what the second stores in the same step."""
        c = self.any_context(num_layers=1)
        size = c.block_size
        tables = np.array([[0, 2], [0, 1]], np.int32)
        self.check(c, Case(np.array([1, size + 1]), np.array([size + 1, size + 1]), tables, 3))

    @every_mix
    def test_the_same_again(self, mix: str) -> None:
        """Equal batches have equal outputs to the last bit, whatever ran in between."""
        c = self.any_context(num_layers=1)
        rng = np.random.default_rng(7)
        case, other = (Case.draw(rng, c.block_size, *batch) for batch in (MIXES[mix], ([5], [(9, 3)])))
        backend = self.build(c, case.num_blocks)  # more than the other one's
        fill(backend, c, case, torch.Generator().manual_seed(0), self.garbage)
        query = projections(c, int(case.query_lens.sum()), torch.Generator().manual_seed(1))[0]
        between = projections(c, int(other.query_lens.sum()), torch.Generator().manual_seed(2))[0]
        outs = []
        for _ in range(2):
            backend.plan(case.inputs(c.block_size, c.device))
            outs.append(backend.attend(0, query).clone())
            backend.plan(other.inputs(c.block_size, c.device))
            backend.attend(0, between)
        assert torch.equal(outs[0], outs[1])

    def test_the_cache_takes_what_it_says(self, dtype: torch.dtype) -> None:
        """Its content is finite, each layer has its own, and `bytes_per_block` is no less than what it holds."""
        shape = self.any_context()
        c = replace(shape, dtype=dtype)
        backend = self.build(c, 7)
        views = [view for layer in range(c.num_layers) for view in backend.cache(layer)]
        assert {tuple(view.shape) for view in views} == {(7, c.block_size, c.num_kv_heads, c.head_dim)}
        assert all(view.isfinite().all() for view in views)
        assert sum(view.numel() * view.element_size() for view in views) <= 7 * backend.bytes_per_block
        for index, view in enumerate(views):
            view.fill_(index + 1)
        assert all((view == index + 1).all() for index, view in enumerate(views)), "views overlap"

    def test_two_backends_share_nothing(self) -> None:
        c = self.any_context()
        one, two = (self.build(c, 3) for _ in range(2))
        before = two.cache(0)[0].clone()
        one.cache(0)[0].fill_(1.5)
        assert torch.equal(two.cache(0)[0], before)

    @pytest.mark.parametrize("normed", [False, True], ids=["bare", "normed"])
    def test_projections(self, normed: bool, shape: Shape, dtype: torch.dtype) -> None:
        """Norm, rotation, storing and attention in one, where the backend has a way for it."""
        c = context(*shape, dtype, DEVICE, num_layers=1)
        decodes = [1, 300, 16, 17, 5, 128, 129]
        self.check_projection(c, Case.draw(np.random.default_rng(3), c.block_size, decodes), normed=normed)

    @every_mix
    def test_sequences_without_tokens(self, mix: str) -> None:
        """A captured step ends with sequences that have none; the host's numbers are bounds, and no decode is known."""
        c = self.any_context(num_layers=1)
        case = Case.draw(np.random.default_rng(7), c.block_size, *MIXES[mix])
        backend = self.build(c, case.num_blocks)
        if not backend.capturable_chunks:
            pytest.skip("steps with prefill chunks are never captured with it")
        fill(backend, c, case, torch.Generator().manual_seed(0), self.garbage)
        query = projections(c, int(case.query_lens.sum()), torch.Generator().manual_seed(1))[0]
        exact = self.exact(c, 0, case.inputs(c.block_size, c.device), query, backend.cache(0))
        inputs, more = case.inputs(c.block_size, c.device), 3
        inputs.query_start_S1 = torch.cat((inputs.query_start_S1, inputs.query_start_S1[-1:].repeat(more)))
        inputs.context_lens_S = torch.cat((inputs.context_lens_S, inputs.context_lens_S.new_ones(more)))
        inputs.block_tables_SB = torch.cat((inputs.block_tables_SB, inputs.block_tables_SB[:1].repeat(more, 1)))
        inputs.query_lens = np.full(len(case.query_lens) + more, query.shape[0])
        inputs.context_lens = np.full(len(case.query_lens) + more, int(case.context_lens.max()))
        inputs.num_decodes = 0
        backend.plan(inputs)
        poison(query)
        self.compare(c, backend.attend(0, query), exact)

    @needs_gpu
    @graph_shapes
    @graph_windows
    @pytest.mark.parametrize("num_seqs", [1, 5, 64, 256])
    def test_captured_decodes(self, num_seqs: int, windows: Windows, shape: Shape, dtype: torch.dtype) -> None:
        """Captured for the longest contexts there can be, replayed with others in other blocks; the last rows are
        padding, and an eager step of another kind in between disturbs nothing."""
        c, rng, longest = context(*shape, dtype, DEVICE, windows=windows), np.random.default_rng(0), 1536
        widest = Case.draw(rng, c.block_size, [longest] * num_seqs, spare=0)
        backend = self.build(c, widest.num_blocks)
        if not backend.capturable:
            pytest.skip("it is never captured")
        fill(backend, c, widest, torch.Generator().manual_seed(0), self.garbage)
        inputs = widest.inputs(c.block_size, DEVICE)
        new = [projections(c, num_seqs, torch.Generator().manual_seed(layer)) for layer in range(c.num_layers)]

        def step() -> list[torch.Tensor]:
            backend.plan(inputs)
            return [backend.forward(layer, *new[layer]) for layer in range(c.num_layers)]

        graph, outs = captured(step)
        other = Case.draw(rng, c.block_size, [5], [(9, 3)])
        between = projections(c, 10, torch.Generator().manual_seed(9))[0]
        kept = num_seqs - num_seqs // 4
        for _ in range(4):
            lengths = rng.integers(1, longest + 1, num_seqs)
            lengths[kept:] = 1
            case = Case.draw(rng, c.block_size, lengths.tolist(), spare=0)
            now = case.inputs(c.block_size, DEVICE)
            inputs.context_lens_S.copy_(now.context_lens_S)
            inputs.slot_mapping_T.copy_(now.slot_mapping_T)
            width = min(inputs.block_tables_SB.shape[1], now.block_tables_SB.shape[1])
            inputs.block_tables_SB[:, :width].copy_(now.block_tables_SB[:, :width])
            for out in outs:
                out.fill_(torch.nan)
            graph.replay()
            again = [out.clone() for out in outs]
            for layer, out in enumerate(outs):
                assert out.isfinite().all(), "padding must give finite numbers"
                query, key, value = new[layer]
                exact = self.exact(c, layer, now, query, stored(backend, layer, c, now.slot_mapping_T, key, value))
                self.compare(c, out[:kept], exact[:kept])
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True)), "the same again"
            backend.plan(other.inputs(c.block_size, DEVICE))
            backend.attend(0, between)

    @needs_gpu
    @graph_shapes
    @graph_windows
    @pytest.mark.parametrize("num_tokens", [48, 300])
    def test_captured_chunks(self, num_tokens: int, windows: Windows, shape: Shape, dtype: torch.dtype) -> None:
        """One capture serves decodes, chunks and both; the rest is a sequence of padding and some of no tokens."""
        c, rng = context(*shape, dtype, DEVICE, windows=windows), np.random.default_rng(1)
        num_seqs, longest = 24, 2048
        size, width = c.block_size, longest // c.block_size
        num_blocks = num_seqs * width + 1
        backend = self.build(c, num_blocks)
        if not backend.capturable_chunks:
            pytest.skip("steps with prefill chunks are never captured with it")
        new = projections(c, num_tokens, torch.Generator().manual_seed(0))
        inputs = nothing_but_padding(c, num_tokens, num_seqs, width, num_blocks - 1)

        def step() -> list[torch.Tensor]:
            backend.plan(inputs)
            return [backend.forward(layer, *new) for layer in range(c.num_layers)]

        graph, outs = captured(step)
        mixes = [
            (5, []), (0, [(num_tokens, 0)]), (20, [(2, 40), (17, 900)]), (3, [(9, 0), (1, 77), (20, 300)]),
            (1, [(30, 1)]),
        ]  # fmt: skip
        for num_decodes, chunks in mixes:
            case = Case.draw(rng, size, rng.integers(1, longest, num_decodes).tolist(), chunks, spare=0)
            now, used, count = case.inputs(size, DEVICE), int(case.query_lens.sum()), len(case.query_lens)
            inputs.slot_mapping_T.fill_((num_blocks - 1) * size)[:used] = now.slot_mapping_T
            inputs.query_start_S1.fill_(num_tokens)[: count + 1] = now.query_start_S1
            inputs.context_lens_S.fill_(1)[:count] = now.context_lens_S
            inputs.context_lens_S[count] = max(1, num_tokens - used)
            tables = now.block_tables_SB[:, :width]
            inputs.block_tables_SB.fill_(num_blocks - 1)[:count, : tables.shape[1]] = tables
            for layer in range(c.num_layers):
                for cache in backend.cache(layer):
                    cache.copy_(torch.randn(cache.shape, device=DEVICE))
            for out in outs:
                out.fill_(torch.nan)
            graph.replay()
            query, key, value = (x[:used] for x in new)
            for layer, out in enumerate(outs):
                exact = self.exact(c, layer, now, query, stored(backend, layer, c, now.slot_mapping_T, key, value))
                self.compare(c, out[:used], exact)

    def check(self, c: AttentionContext, case: Case, seed: int = 0) -> None:
        """`forward` of all layers on a cache with garbage wherever no token of the batch's contexts lies."""
        backend = self.build(c, case.num_blocks)
        inputs = case.inputs(c.block_size, c.device)
        backend.plan(inputs)
        assert torch.equal(backend.slot_mapping_T, inputs.slot_mapping_T)
        fill(backend, c, case, torch.Generator().manual_seed(seed), self.garbage)
        generator = torch.Generator().manual_seed(seed + 1)
        for layer in range(c.num_layers):
            query, key, value = projections(c, int(case.query_lens.sum()), generator)
            caches = stored(backend, layer, c, inputs.slot_mapping_T, key, value)
            poison(query)
            out = backend.forward(layer, query, key, value)
            assert (out.shape, out.dtype) == (query.shape, c.dtype)
            for mine, theirs in zip(backend.cache(layer), caches, strict=True):
                assert same(mine, theirs), "forward must write the new tokens' slots and no others"
            self.compare(c, out, self.exact(c, layer, inputs, query, caches))

    def check_projection(self, c: AttentionContext, case: Case, *, normed: bool, seed: int = 0) -> None:
        """`project_and_attend` of all layers on a batch of decodes, against the same steps one by one."""
        backend = self.build(c, case.num_blocks)
        inputs = replace(case.inputs(c.block_size, c.device), uniform_decode=True)
        backend.plan(inputs)
        fill(backend, c, case, torch.Generator().manual_seed(seed), self.garbage)
        generator = torch.Generator().manual_seed(seed + 1)
        positions = torch.from_numpy(case.context_lens - 1).to(c.device)
        angles = torch.rand(int(case.context_lens.max()), c.head_dim // 2, generator=generator).to(c.device) * 6
        cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
        weights = torch.randn(2, c.head_dim, generator=generator).to(c.device, c.dtype) if normed else (None, None)
        heads = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        for layer in range(c.num_layers):
            qkv = torch.randn(len(positions), sum(heads) * c.head_dim + 16, generator=generator)
            qkv = qkv.to(c.device, c.dtype)[:, :-16]
            q, k, v = qkv.float().unflatten(-1, (-1, c.head_dim)).split(heads, 1)
            if normed:
                q, k = (F.rms_norm(x, (c.head_dim,), w.float(), 1e-6) for x, w in zip((q, k), weights, strict=True))
            q, k = (apply_rotary(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)) for x in (q, k))
            caches = stored(backend, layer, c, inputs.slot_mapping_T, k, v)
            poison(q.to(c.dtype))
            out = backend.project_and_attend(layer, Projection(qkv, *weights, 1e-6, cos, sin, positions))
            if out is None:
                return
            new = torch.zeros(case.num_blocks * c.block_size, dtype=torch.bool, device=c.device)
            new[inputs.slot_mapping_T] = True
            for mine, theirs in zip(backend.cache(layer), caches, strict=True):
                mine, theirs = mine.flatten(0, 1), theirs.flatten(0, 1)
                self.compare(c, mine[new], theirs[new])
                assert same(mine[~new], theirs[~new]), "only the new tokens' slots may be written"
            self.compare(c, out, self.exact(c, layer, inputs, q, caches))

    def exact(
        self, c: AttentionContext, layer: int, inputs: AttentionInput, query_TNH: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """What the layer's attention is by `reference_mask`, [T, N, H] in float64."""
        return written_out(c, layer, inputs, query_TNH, cache, self.reference_mask)

    def compare(self, c: AttentionContext, mine: torch.Tensor, exact: torch.Tensor) -> None:
        """Within the bound of the dtype."""
        found, bound = distance(mine, exact), self.bounds[c.dtype]
        assert found < bound, f"off by {found:.1e}, more than {bound:.0e}, for {c}"


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether all values are equal; NaN is equal to NaN."""
    return torch.allclose(mine, theirs, rtol=0, atol=0, equal_nan=True)


def stored(
    backend: AttentionBackend, layer: int, c: AttentionContext, slots_T: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Copies of the layer's cache with these keys and values where they belong."""
    caches = []
    for cache, new in zip(backend.cache(layer), (key, value), strict=True):
        copy = cache.clone(memory_format=torch.contiguous_format)
        copy.view(-1, c.num_kv_heads, c.head_dim)[slots_T] = new.to(c.dtype)
        caches.append(copy)
    return caches[0], caches[1]


def nothing_but_padding(c: AttentionContext, num_tokens: int, num_seqs: int, width: int, block: int) -> AttentionInput:
    """A step as it is captured: one sequence with one token, and all others with none, in a block that is nobody's."""
    query_start_S1 = torch.ones(num_seqs + 1, dtype=torch.int32, device=c.device)
    query_start_S1[0] = 0
    return AttentionInput(
        slot_mapping_T=torch.full((num_tokens,), block * c.block_size, device=c.device),
        query_start_S1=query_start_S1,
        context_lens_S=torch.ones(num_seqs, dtype=torch.int32, device=c.device),
        block_tables_SB=torch.full((num_seqs, width), block, dtype=torch.int32, device=c.device),
        query_lens=np.full(num_seqs, num_tokens),
        context_lens=np.full(num_seqs, width * c.block_size),
        num_decodes=0,
    )


def captured(step: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """The step as a graph, and what its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    return graph, outs
