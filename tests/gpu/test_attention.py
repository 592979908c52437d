"""Every attention backend on a GPU against the torch backend in float32, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoflow.core.interfaces import AttentionBackend, AttentionContext, NoOptions
from nanoflow.core.types import AttentionInput
from nanoflow.plugins.attention import nanoflow_attention_backends
from nanoflow.plugins.attention.options import FlashConfig
from nanoflow.plugins.attention.torch_paged import TorchAttention
from tests.plugins.attention.batches import Case, context, errors, fill, projected_errors, projections

DEVICE = torch.device("cuda")
BLOCK_SIZES = (16, 64, 256)
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def exact_reference() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def builder(name: str, c: AttentionContext) -> tuple[type[AttentionBackend], object]:
    """What builds backend `name`, and its config; skips where it can't serve."""
    component = next(x for x in nanoflow_attention_backends() if x.name == name)
    config = component.config()
    if reason := component.available() or component.supports(config, c):
        pytest.skip(reason)
    return component.build, config


def cases(block_size: int) -> list[Case]:
    rng = np.random.default_rng(block_size)

    def lengths(count: int, most: int) -> list[int]:
        return rng.integers(1, most, count).tolist()

    return [
        Case.draw(rng, block_size, [1]),
        Case.draw(rng, block_size, [3000]),
        Case.draw(rng, block_size, lengths(37, 1500)),
        Case.draw(rng, block_size, lengths(200, 300), shared=2),
        Case.draw(rng, block_size, [], [(300, 0), (128, 0), (2, 700), (77, 500), (513, 64)]),
        Case.draw(rng, block_size, lengths(9, 800), [(2, 0), (200, 333), (64, 1024), (1000, 0)], shared=1),
    ]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16), ("flash", torch.bfloat16),
        ("flash", torch.float16), ("hybrid", torch.bfloat16),
    ],
)  # fmt: skip
def test_against_torch(name: str, dtype: torch.dtype, group: int, head_dim: int) -> None:
    for block_size in BLOCK_SIZES:
        c = context(group, head_dim, block_size, dtype, DEVICE)
        build, config = builder(name, c)
        for case in cases(block_size):
            assert max(errors(build, config, c, case)) < BOUNDS[dtype], (block_size, case)


@pytest.mark.parametrize(("group", "head_dim"), [(3, 80), (5, 96), (7, 32), (16, 256), (1, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusual_shapes(dtype: torch.dtype, group: int, head_dim: int) -> None:
    c = context(group, head_dim, 16, dtype, DEVICE)
    build, config = builder("triton", c)
    for case in cases(16):
        assert max(errors(build, config, c, case)) < BOUNDS[dtype]


@pytest.mark.parametrize("window", [1, 30, 64, 500, 4096])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("flash", torch.bfloat16), ("hybrid", torch.bfloat16)],
)
def test_windows(name: str, dtype: torch.dtype, window: int) -> None:
    """In one layer of two; contexts are shorter and longer, and projected ones too."""
    rng = np.random.default_rng(0)
    for block_size in BLOCK_SIZES:
        c = context(4, 128, block_size, dtype, DEVICE, windows=(window, None))
        build, config = builder(name, c)
        for case in cases(block_size):
            assert max(errors(build, config, c, case)) < BOUNDS[dtype], (block_size, case)
        for count in (1, 9) if name == "triton" else ():
            case = Case.draw(rng, block_size, rng.integers(1, 900, count).tolist())
            assert max(projected_errors(build, config, c, case, normed=count == 1)) < BOUNDS[dtype], (block_size, count)


@pytest.mark.parametrize("num_splits", [1, 3, 16])
def test_splits(num_splits: int) -> None:
    c = context(2, 128, 256, torch.bfloat16, DEVICE)
    build, _ = builder("flash", c)
    for case in cases(256):
        assert max(errors(build, FlashConfig(num_splits=num_splits), c, case)) < 1e-2


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projections(dtype: torch.dtype, group: int, head_dim: int) -> None:
    """Norm, rotation, storing and attention in one kernel."""
    rng = np.random.default_rng(0)
    for block_size in BLOCK_SIZES:
        c = context(group, head_dim, block_size, dtype, DEVICE)
        build, config = builder("triton", c)
        for count in (1, 2, 9, 24):
            case = Case.draw(rng, block_size, rng.integers(1, 900, count).tolist())
            found = projected_errors(build, config, c, case, normed=count != 9)
            assert max(found) < BOUNDS[dtype], (block_size, count)


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


@pytest.mark.parametrize("num_tokens", [48, 300])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("windows", [(), (None, 300)])
@pytest.mark.parametrize("name", ["triton", "flash", "hybrid"])
def test_replays_of_any_mix(name: str, windows: tuple[int | None, ...], block_size: int, num_tokens: int) -> None:
    """One capture serves decodes, chunks and both; the rest is a sequence of padding and some of no tokens."""
    c = context(2, 128, block_size, torch.bfloat16, DEVICE, windows=windows)
    build, config = builder(name, c)
    rng, num_seqs, longest = np.random.default_rng(1), 24, 2048
    width, num_blocks = longest // block_size, 24 * longest // block_size + 1
    backend, reference = build(config, c), TorchAttention(NoOptions(), replace(c, dtype=torch.float32))
    for one in (backend, reference):
        one.allocate(num_blocks)
    query, key, value = projections(c, num_tokens, torch.Generator().manual_seed(0))
    inputs = AttentionInput(
        slot_mapping_T=torch.full((num_tokens,), (num_blocks - 1) * block_size, device=DEVICE),
        query_start_S1=torch.full((num_seqs + 1,), num_tokens, dtype=torch.int32, device=DEVICE),
        context_lens_S=torch.ones(num_seqs, dtype=torch.int32, device=DEVICE),
        block_tables_SB=torch.full((num_seqs, width), num_blocks - 1, dtype=torch.int32, device=DEVICE),
        query_lens=np.full(num_seqs, num_tokens),
        context_lens=np.full(num_seqs, longest),
        num_decodes=0,
    )
    inputs.query_start_S1.fill_(1)[0] = 0

    def step() -> list[torch.Tensor]:
        backend.plan(inputs)
        return [backend.forward(layer, query, key, value) for layer in range(c.num_layers)]

    graph, outs = captured(step)
    mixes = [
        (5, []),
        (0, [(num_tokens, 0)]),
        (20, [(2, 40), (17, 900)]),
        (3, [(9, 0), (1, 77), (20, 300)]),
        (1, [(30, 1)]),
    ]
    for num_decodes, chunks in mixes:
        case = Case.draw(rng, block_size, rng.integers(1, longest, num_decodes).tolist(), chunks, spare=0)
        now, used, count = case.inputs(block_size, DEVICE), int(case.query_lens.sum()), len(case.query_lens)
        inputs.slot_mapping_T.fill_((num_blocks - 1) * block_size)[:used] = now.slot_mapping_T
        inputs.query_start_S1.fill_(num_tokens)[: count + 1] = now.query_start_S1
        inputs.context_lens_S.fill_(1)[:count] = now.context_lens_S
        inputs.context_lens_S[count] = max(1, num_tokens - used)
        inputs.block_tables_SB.fill_(num_blocks - 1)[:count, : now.block_tables_SB.shape[1]] = now.block_tables_SB[
            :, :width
        ]
        for layer in range(c.num_layers):
            for mine, theirs in zip(backend.cache(layer), reference.cache(layer), strict=True):
                mine.copy_(torch.randn(mine.shape, device=DEVICE))
                theirs.copy_(mine)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        reference.plan(now)
        for layer, out in enumerate(outs):
            expected = reference.forward(layer, *(x[:used].float() for x in (query, key, value)))
            assert float((out[:used].float() - expected).norm() / expected.norm()) < 1e-2, (num_decodes, chunks)


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("num_seqs", [1, 5, 64, 256])
@pytest.mark.parametrize("windows", [(), (None, 300)])
@pytest.mark.parametrize("name", ["triton", "flash", "hybrid"])
def test_replays_follow_the_lengths(name: str, windows: tuple[int | None, ...], num_seqs: int, block_size: int) -> None:
    """Captured for the longest contexts there can be, replayed with others, in other blocks; the last rows padding."""
    c = context(2, 128, block_size, torch.bfloat16, DEVICE, windows=windows)
    build, config = builder(name, c)
    rng = np.random.default_rng(0)
    longest = 1536
    static_case = Case.draw(rng, block_size, [longest] * num_seqs)
    backend = build(config, c)
    backend.allocate(static_case.num_blocks)
    fill(backend, c, static_case, torch.Generator().manual_seed(0))
    inputs = static_case.inputs(block_size, DEVICE)
    fused = [projections(c, num_seqs, torch.Generator().manual_seed(layer)) for layer in range(c.num_layers)]

    def step() -> list[torch.Tensor]:
        backend.plan(inputs)
        return [backend.forward(layer, *fused[layer]) for layer in range(c.num_layers)]

    graph, outs = captured(step)
    # An eager step of another kind in between must not disturb the graph.
    other = Case.draw(rng, block_size, [5], [(9, 3)])
    eager_query = projections(c, 10, torch.Generator().manual_seed(9))[0]
    exact = replace(c, dtype=torch.float32)
    for _ in range(4):
        case = Case.draw(rng, block_size, rng.integers(1, longest + 1, num_seqs).tolist(), spare=0)
        now = case.inputs(block_size, DEVICE)
        inputs.context_lens_S.copy_(now.context_lens_S)
        inputs.slot_mapping_T.copy_(now.slot_mapping_T)
        width = min(inputs.block_tables_SB.shape[1], now.block_tables_SB.shape[1])
        inputs.block_tables_SB[:, :width].copy_(now.block_tables_SB[:, :width])
        inputs.context_lens_S[num_seqs - num_seqs // 4 :] = torch.randint(0, 2, (num_seqs // 4,)).to(DEVICE)
        reference = TorchAttention(NoOptions(), exact)
        reference.allocate(static_case.num_blocks)
        reference.plan(now)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        again = [out.clone() for out in outs]
        for layer, out in enumerate(outs):
            for mine, theirs in zip(backend.cache(layer), reference.cache(layer), strict=True):
                theirs.copy_(mine)
            kept = num_seqs - num_seqs // 4
            expected = reference.attend(layer, fused[layer][0].float())[:kept]
            assert out.isfinite().all()
            assert float((out[:kept].float() - expected).norm() / expected.norm()) < 1e-2
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True)), "the same again"
        backend.plan(other.inputs(block_size, DEVICE))
        backend.attend(0, eager_query)
