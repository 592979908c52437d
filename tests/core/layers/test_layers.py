"""What the layers promise beside their kernels, in plain PyTorch on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers import GatedLinear, Linear, RMSNorm, Rotation, attend
from nanoflow.core.ops import Ops
from nanoflow.core.ops.filters import Filters, keep_likely, keep_top
from nanoflow.core.ops.sampling import gumbel_noise, sample

CONTEXT = ModelContext({}, torch.float32, torch.device("cpu"), 32)
SIZE, HEAD_DIM, BLOCK_SIZE = 24, 8, 4


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
    return layer


class Cache(AttentionBackend):
    """Two blocks for three tokens."""

    bytes_per_block = 0
    slot_mapping_T = torch.tensor([5, 1, 2])

    def __init__(self) -> None:
        self.tensors = torch.zeros(2, 2, BLOCK_SIZE, 2, HEAD_DIM)

    def allocate(self, num_blocks: int) -> None: ...

    def plan(self, inputs: object) -> None: ...

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0], self.tensors[1]

    def attend(self, layer: int, query_TNH: torch.Tensor) -> torch.Tensor:
        return query_TNH


def test_norm_adds_partials() -> None:
    norm = filled(RMSNorm(CONTEXT, SIZE, 1e-6))
    parts, residual = torch.randn(3, 5, SIZE), torch.randn(5, SIZE)
    out, total = norm.add(parts, residual.clone())
    torch.testing.assert_close(total, parts.sum(0) + residual)
    torch.testing.assert_close(out, norm(total))
    out, total = norm.add(None, residual)
    assert torch.equal(total, residual)
    assert torch.equal(out, norm(residual))


def test_a_layer_behind_a_norm() -> None:
    norm = filled(RMSNorm(CONTEXT, SIZE, 1e-6))
    x, residual = torch.randn(2, 5, SIZE)
    linear, gated = (
        filled(Linear(CONTEXT, SIZE, {"a": 6, "b": 6})),
        filled(GatedLinear(CONTEXT, SIZE, {"g": 6, "u": 6})),
    )
    hidden = norm(x + residual)
    for layer, expected in (
        (linear, hidden @ linear.weight.T),
        (gated, F.silu(hidden @ gated.weight[:6].T) * (hidden @ gated.weight[6:].T)),
    ):
        y, total = layer.norm_linear(norm, x, residual)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(layer.partials(hidden), expected)


def test_queries_come_back_and_keys_and_values_are_stored() -> None:
    """At position 0, where nothing is rotated, and at others, where lengths stay."""
    angles = torch.outer(torch.arange(9.0), torch.rand(HEAD_DIM // 2))
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    cache, qkv = Cache(), torch.randn(3, 7 * HEAD_DIM)
    query = attend(Ops(), qkv, None, None, Rotation(cos, sin, torch.tensor([0, 3, 8])), cache, 0)
    heads = qkv.view(3, 7, HEAD_DIM)
    keys, values = (tensor.flatten(0, 1)[cache.slot_mapping_T] for tensor in cache.tensors)
    assert torch.equal(values, heads[:, 5:])
    assert torch.equal(query[0], heads[0, :3])
    assert torch.equal(keys[0], heads[0, 3:5])
    torch.testing.assert_close(query.norm(dim=-1), heads[:, :3].norm(dim=-1))
    torch.testing.assert_close(keys.norm(dim=-1), heads[:, 3:5].norm(dim=-1))
    assert not torch.allclose(query[1:], heads[1:, :3])
    assert cache.tensors.count_nonzero() == 2 * 3 * 2 * HEAD_DIM


def test_noise_is_finite() -> None:
    """The largest random number of this row must not be rounded up to 1, whose noise is infinite."""
    noise = gumbel_noise(torch.tensor([[56]]), torch.tensor([[0]]), 2**17)
    assert noise.isfinite().all()
    assert 15 < noise.max() < 17


def test_sample_mixes_greedy_and_filtered_rows() -> None:
    logits = torch.randn(40, 200) * 3
    temperature = torch.tensor([0, 0.7, 1e-42, 1.3]).repeat(10)
    filters = Filters(torch.tensor([3, 200]).repeat(20), torch.full((40,), 0.8), torch.full((40,), 0.05))
    tokens = sample(logits, temperature, torch.arange(40), torch.arange(40), filters)
    greedy = temperature < 0.5
    assert torch.equal(tokens[greedy], logits.argmax(-1)[greedy])
    scores = logits / temperature.clamp(min=1e-10).unsqueeze(-1)
    kept = keep_likely(
        keep_top(scores, filters.top_k_S.unsqueeze(-1), filters.top_p_S.unsqueeze(-1)), filters.min_p_S.unsqueeze(-1)
    )
    assert kept.gather(-1, tokens.unsqueeze(-1)).isfinite().all()


def test_ties_with_the_last_one_kept_are_kept() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for top_k, top_p in ((2, 1.0), (5, 0.7)):
        kept = keep_top(scores, torch.tensor([[top_k]]), torch.tensor([[top_p]]))
        assert kept.isfinite().tolist() == [[False, True, True, True, False]]
