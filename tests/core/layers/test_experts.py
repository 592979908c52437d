"""A mixture of experts in plain PyTorch: token by token, and split over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.layers import Experts, RMSNorm
from nanoflow.core.loading.safetensors import load_weights
from nanoflow.core.ops.experts import route
from nanoflow.testing.ranks import on_ranks
from tests.core.sentences import raises_sentence

CONTEXT = ModelContext({}, torch.float32, torch.device("cpu"), 32)
HIDDEN, INNER, NUM_EXPERTS, NUM_CHOSEN = 20, 12, 5, 3


def make(context: ModelContext, *, renormalize: bool = True) -> Experts:
    return Experts(context, HIDDEN, INNER, NUM_EXPERTS, NUM_CHOSEN, renormalize=renormalize)


def make_norm() -> RMSNorm:
    norm = RMSNorm(CONTEXT, HIDDEN, 1e-6)
    norm.weight.copy_(torch.randn(HIDDEN))
    return norm


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of each expert apart, in a file of that folder."""
    tensors = {"x.gate.weight": torch.randn(NUM_EXPERTS, HIDDEN)}
    for expert in range(NUM_EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
            tensors[f"x.experts.{expert}.{name}.weight"] = torch.randn(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("renormalize", [False, True])
def test_token_by_token(renormalize: bool, checkpoint: dict[str, torch.Tensor], tmp_path: Path) -> None:
    layer, norm = make(CONTEXT, renormalize=renormalize), make_norm()
    load_weights(tmp_path, layer.weights("x."))
    x, residual = torch.randn(2, 7, HIDDEN)
    out, total = layer(norm, x, residual)
    torch.testing.assert_close(total, x + residual)
    for token, hidden in enumerate(norm(x + residual)):
        likely = (checkpoint["x.gate.weight"] @ hidden).softmax(0)
        chosen = likely.argsort(descending=True)[:NUM_CHOSEN]
        expected = torch.zeros(HIDDEN)
        for expert in chosen.tolist():
            gate, up, down = (checkpoint[f"x.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            expected += likely[expert] * (down @ (F.silu(gate @ hidden) * (up @ hidden)))
        expected = expected / likely[chosen].sum() if renormalize else expected
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_norm", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("checkpoint")
def test_split_over_ranks(size: int, in_norm: bool, tmp_path: Path) -> None:
    whole, norm = make(CONTEXT), make_norm()
    load_weights(tmp_path, whole.weights("x."))
    x, residual = torch.randn(2, 7, HIDDEN)
    expected, _ = norm.add(*whole(norm, x, residual))

    def work(parallel: ParallelContext) -> torch.Tensor:
        layer = make(replace(CONTEXT, parallel=parallel))
        assert layer.down_XDF.shape == (NUM_EXPERTS, HIDDEN, INNER // size)
        load_weights(tmp_path, layer.weights("x."))
        return norm.add(*layer(norm, x, residual))[0]

    for out in on_ranks(size, work, in_norm=in_norm):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_an_inner_size_that_does_not_divide() -> None:
    with raises_sentence(ConfigError, "the model's 12 inner features of an expert can't be split evenly"):
        make(replace(CONTEXT, parallel=ParallelContext(1, 5)))


def test_weights_of_the_chosen_ones_sum_up_to_one() -> None:
    weights, chosen = route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]).half(), 2, renormalize=True)
    assert chosen.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 2.0]]).softmax(-1))
