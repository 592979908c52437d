"""Kernels on the GPU at the shapes of real models, and captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.kernels.gemm.settings import GemvConfig, SkinnyConfig, TiledConfig, TmaConfig
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.layers import Embedding, Experts, GatedLinear, Linear, RMSNorm
from nanoflow.core.ops.filters import Filters
from tests.core.kernels import checks

DEVICE = torch.device("cuda")
OPS = select_ops(DEVICE)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB_SIZE = 151_936
SHAPES = {"small": (1024, 4096, 2048, 3072), "large": (4096, 6144, 4096, 12288)}  # hidden, qkv, heads, inner


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1024, 4096, 5120, 2500])
@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (64, 0), (300, 1), (33, 4)])
def test_norm(rows: int, size: int, parts: int, dtype: torch.dtype) -> None:
    checks.check_norm(rows, size, parts, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 5120])
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_embedding(tokens: int, width: int, dtype: torch.dtype) -> None:
    checks.check_embedding(tokens, 1000, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 3072), (64, 12288), (300, 1000)])
def test_gate(rows: int, size: int, dtype: torch.dtype) -> None:
    checks.check_gate(rows, size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "has_norm"),
    [(16, 8, 128, 256, True), (32, 8, 128, 16, True), (14, 2, 64, 16, False), (5, 1, 80, 16, True)],
)
def test_rotary(
    tokens: int, heads: int, kv_heads: int, head_dim: int, block_size: int, has_norm: bool, dtype: torch.dtype
) -> None:
    checks.check_rotary(tokens + 1, heads, kv_heads, head_dim, block_size, has_norm, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [GemvConfig(4, 1024, 4), GemvConfig(1, 4096, 4), GemvConfig(8, 512, 2)], ids=str)
@pytest.mark.parametrize(("gated", "normed", "bias"), [(False, False, True), (True, True, False), (True, True, True)])
@pytest.mark.parametrize(("outputs", "size"), [(6144, 1024), (1022, 3072), (4096, 12288)])
def test_gemv(
    outputs: int, size: int, gated: bool, normed: bool, bias: bool, config: GemvConfig, dtype: torch.dtype
) -> None:
    checks.check_gemv(outputs, size, gated, normed, bias, config, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize(
    ("outputs", "size", "gated", "normed"),
    [(4096, 1024, False, True), (6140, 1024, True, True), (1024, 1536, False, False), (1000, 2048, False, False)],
)
def test_skinny_gemm(rows: int, outputs: int, size: int, gated: bool, normed: bool, dtype: torch.dtype) -> None:
    for values in ((16, 8), (32, 4)):
        checks.check_skinny_gemm(rows, outputs, size, gated, normed, not gated, SkinnyConfig(*values), dtype, "cuda")


tiled = pytest.mark.parametrize(
    ("outputs", "size", "splits", "gated"),
    [(4096, 1024, 1, False), (6140, 1024, 1, True), (1024, 3072, 4, False), (1000, 2048, 3, False)],
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 65, 128, 200])
@tiled
def test_tma_gemm(rows: int, outputs: int, size: int, splits: int, gated: bool, dtype: torch.dtype) -> None:
    for values in ((64, 32, 64, splits, 4, 4), (64, 32, 256, splits, 4, 2), (128, 64, 128, splits, 8, 3)):
        checks.check_gemm(rows, outputs, size, gated, splits == 1, TmaConfig(*values), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 16, 33, 64])
@tiled
def test_tiled_gemm(rows: int, outputs: int, size: int, splits: int, gated: bool, dtype: torch.dtype) -> None:
    for values in ((16, 16, 256, splits, 2, 3), (64, 32, 128, splits, 4, 4), (64, 64, 64, splits, 4, 4)):
        checks.check_gemm(rows, outputs, size, gated, splits == 1, TiledConfig(*values), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 300, 1000, 3000])
@pytest.mark.parametrize(
    ("size", "inner", "num_experts", "num_chosen"), [(2048, 768, 128, 8), (1000, 184, 60, 4), (256, 512, 8, 2)]
)
def test_experts(size: int, inner: int, num_experts: int, num_chosen: int, tokens: int, dtype: torch.dtype) -> None:
    checks.check_experts(tokens, size, inner, num_experts, num_chosen, tokens % 2 == 0, None, dtype, "cuda")


@pytest.mark.parametrize("tokens", [1, 16, 500])
def test_experts_in_a_graph(tokens: int) -> None:
    """Captured with all tokens at one expert, and replayed with others."""
    context = ModelContext({}, torch.bfloat16, DEVICE, 16, ops=OPS)
    layer = Experts(context, 1024, 256, 64, 4, renormalize=True)
    norm = RMSNorm(context, 1024, 1e-6)
    norm.weight.fill_(1)
    filled(layer.router)
    for weight in (layer.gate_up_X2FD, layer.down_XDF):
        weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    x = checks.random(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    start = x[:1].repeat(tokens, 1)

    def block() -> torch.Tensor:
        return norm.add(*layer(norm, None, start.clone()))[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        block()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block()
    start.copy_(x)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, block()), "the same bits, in a graph or not, at each time"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ties"), [(1, False), (5, True), (64, False)])
def test_sampling(rows: int, ties: bool, dtype: torch.dtype) -> None:
    checks.check_draw(rows, VOCAB_SIZE, dtype, "cuda", ties)
    checks.check_filters(rows, VOCAB_SIZE, dtype, "cuda", ties)
    for size in (300, VOCAB_SIZE // 4):
        checks.check_draw_by_ranks(rows, size, 4, dtype, "cuda")
    checks.check_no_token(VOCAB_SIZE, 4, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("biased", "penalized"), [(False, False), (True, False), (False, True), (True, True)])
def test_adjust(rows: int, biased: bool, penalized: bool, dtype: torch.dtype) -> None:
    checks.check_adjust(rows, VOCAB_SIZE, dtype, "cuda", biased, penalized)


@pytest.mark.parametrize(("num_tokens", "num_seqs", "width"), [(1, 1, 3), (256, 256, 2560), (2048, 200, 100)])
def test_gather_step_inputs(num_tokens: int, num_seqs: int, width: int) -> None:
    checks.check_gather_step_inputs(num_tokens, num_seqs, width, 16, "cuda")


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(2, 1), (8192, 257)])
def test_pinned_io(num_tokens: int, num_seqs: int) -> None:
    checks.check_pinned_io(num_tokens, num_seqs, "cuda")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 40, 64, 65, 256])
def test_layers(name: str, rows: int) -> None:
    """The layers themselves, whatever way they choose, beside PyTorch in float32."""
    hidden, qkv, heads, inner = SHAPES[name]
    context = ModelContext({}, torch.bfloat16, DEVICE, 16, ops=OPS)
    norm = RMSNorm(context, hidden, 1e-6)
    norm.weight.copy_(checks.random(hidden, dtype=torch.bfloat16, device="cuda", seed=9))
    x, residual = checks.random(2, rows, hidden, dtype=torch.bfloat16, device="cuda")
    normed = F.rms_norm((x + residual).float(), (hidden,), norm.weight.float(), 1e-6)
    for layer in (Linear(context, hidden, {"qkv": qkv}), GatedLinear(context, hidden, {"gate": inner, "up": inner})):
        filled(layer)
        y, total = layer.norm_linear(norm, x, residual.clone())
        checks.close(total, x + residual, torch.bfloat16)
        checks.close(y, checks.in_float32(normed, layer.weight, None, layer.gate), torch.bfloat16)
        checks.close(layer(x), checks.in_float32(x, layer.weight, None, layer.gate), torch.bfloat16)
    for size in (heads, inner):
        layer = filled(Linear(context, size, {"down": hidden}))
        x = checks.random(rows, size, dtype=torch.bfloat16, device="cuda")
        out, total = norm.add(layer.partials(x), residual.clone())
        expected = (F.linear(x.float(), layer.weight.float()) + residual).to(torch.bfloat16)
        checks.close(total, expected, torch.bfloat16)
        checks.close(out, F.rms_norm(expected.float(), (hidden,), norm.weight.float(), 1e-6), torch.bfloat16)


def test_head() -> None:
    context = ModelContext({}, torch.bfloat16, DEVICE, 16, ops=OPS)
    head = filled(Embedding(context, VOCAB_SIZE, 1024))
    for rows in (1, 3, 64, 100):
        x = checks.random(rows, 1024, dtype=torch.bfloat16, device="cuda")
        checks.close(head.logits(x), F.linear(x.float(), head.weight.float()), torch.bfloat16)


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    layer.weight.copy_(torch.randn_like(layer.weight) / layer.weight.shape[1] ** 0.5)
    return layer


def replayed(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a captured call of the function gives when it is replayed over poison."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    out.fill_(-7)
    for _ in range(3):
        graph.replay()
    return out


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_chain_of_kernels_in_a_graph(rows: int) -> None:
    """Kernels that overlap see what those before them wrote."""
    context = ModelContext({}, torch.bfloat16, DEVICE, 16, ops=OPS)
    norms = [RMSNorm(context, 1024, 1e-6) for _ in range(12)]
    gates = [filled(GatedLinear(context, 1024, {"gate": 3072, "up": 3072})) for _ in norms]
    downs = [filled(Linear(context, 3072, {"down": 1024})) for _ in norms]
    for norm in norms:
        norm.weight.fill_(1)
    start = checks.random(rows, 1024, dtype=torch.bfloat16, device="cuda")

    def chain() -> torch.Tensor:
        x, residual = None, start.clone()
        for norm, gate, down in zip(norms, gates, downs, strict=True):
            y, residual = gate.norm_linear(norm, x, residual)
            x = down.partials(y)
        return norms[0].add(x, residual)[0]

    eager = chain().clone()
    assert torch.equal(replayed(chain), eager)
    residual, x = start.float(), 0.0
    for gate, down in zip(gates, downs, strict=True):
        residual = residual + x
        hidden = F.rms_norm(residual, (1024,), None, 1e-6)
        x = F.linear(checks.in_float32(hidden, gate.weight, None, True), down.weight.float())
    expected = F.rms_norm(residual + x, (1024,), None, 1e-6)
    error = (eager.float() - expected).norm() / expected.norm()
    assert error < 0.05


@pytest.mark.parametrize("rows", [1, 16])
def test_sampling_in_a_graph(rows: int) -> None:
    logits = checks.random(rows, VOCAB_SIZE, dtype=torch.bfloat16, device="cuda") * 3
    whole = torch.ones(rows, device="cuda")
    numbers = torch.arange(rows, device="cuda")
    filters = Filters(numbers + 20, whole * 0.9, whole * 0.01)
    for choice in (None, filters):
        eager = OPS.sample(logits, whole * 0.7, numbers, numbers, choice)
        assert torch.equal(
            replayed(lambda choice=choice: OPS.sample(logits, whole * 0.7, numbers, numbers, choice)), eager
        )
