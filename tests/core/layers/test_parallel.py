"""Layers that are split over ranks give what the whole ones do, from the same checkpoint tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.parallel import ParallelContext, RankPartials, Shard, Share
from nanoflow.core.layers import (
    ColumnParallelLinear,
    Embedding,
    GatedLinear,
    Linear,
    QKVLinear,
    RMSNorm,
    RowParallelLinear,
)
from nanoflow.core.loading.dummy import fill_random
from nanoflow.core.loading.safetensors import load_weights
from nanoflow.testing.ranks import on_ranks
from tests.core.sentences import raises_sentence

WHOLE = ModelContext({}, torch.float32, torch.device("cpu"), 32)
HIDDEN, INNER, HEADS, HEAD_DIM, VOCAB = 24, 32, 8, 4, 40

LAYERS: dict[str, Callable[[ModelContext], Linear]] = {
    "whole": lambda context: Linear(context, HIDDEN, {"a": 5, "b": 3}, bias=True),
    "columns": lambda context: ColumnParallelLinear(context, HIDDEN, {"a": INNER, "b": 8}, bias=True),
    "gated": lambda context: GatedLinear(context, HIDDEN, {"gate": INNER, "up": INNER}),
    "rows": lambda context: RowParallelLinear(context, INNER, {"a": HIDDEN}, bias=True),
    **{
        f"qkv{kv}": lambda context, kv=kv: QKVLinear(context, HIDDEN, HEADS, kv, HEAD_DIM, bias=True)
        for kv in (1, 2, 4, 8)
    },
}


def random_checkpoint(layer: Linear, folder: Path) -> Path:
    """A checkpoint of one layer, whose weights go into it as well."""
    targets = {name: target for name, target in layer.weights("x.").items() if isinstance(target, torch.Tensor)}
    for target in targets.values():
        target.normal_()
    save_file({name: target.contiguous() for name, target in targets.items()}, folder / "model.safetensors")
    return folder


def expected(layer: Linear, y: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Which part of the whole layer's result a rank should have."""
    if isinstance(layer, QKVLinear):
        num_kv_heads = layer.parts["k_proj"].total // HEAD_DIM
        q, k, v = y.split([part.length for part in layer.parts.values()], -1)
        first, last = rank * num_kv_heads // size, ((rank + 1) * num_kv_heads - 1) // size
        wanted = slice(first * HEAD_DIM, (last + 1) * HEAD_DIM)
        return torch.cat((q.chunk(size, -1)[rank], k[:, wanted], v[:, wanted]), -1)
    if isinstance(layer, GatedLinear):
        return y.chunk(size, -1)[rank]
    if isinstance(layer, ColumnParallelLinear):
        return torch.cat([part.chunk(size, -1)[rank] for part in y.split([INNER, 8], -1)], -1)
    return y


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(name: str, size: int, tmp_path: Path) -> None:
    whole = LAYERS[name](WHOLE)
    folder = random_checkpoint(whole, tmp_path)
    x = torch.randn(3, whole.inputs.total)
    y = whole(x)

    def work(parallel: ParallelContext) -> torch.Tensor:
        layer = LAYERS[name](replace(WHOLE, parallel=parallel))
        load_weights(folder, layer.weights("x."))
        own = x.chunk(size, -1)[parallel.rank] if isinstance(layer, RowParallelLinear) else x
        torch.testing.assert_close(layer.partials(own), layer(own))
        return layer(own)

    for rank, part in enumerate(on_ranks(size, work)):
        torch.testing.assert_close(part, expected(whole, y, size, rank))


@pytest.mark.parametrize("in_norm", [False, True])
def test_a_norm_adds_up_ranks(in_norm: bool, tmp_path: Path) -> None:
    """And the layer behind it takes what it gives, whether or not the sum was left to the norm."""
    whole = LAYERS["rows"](WHOLE)
    folder = random_checkpoint(whole, tmp_path)
    x, residual = torch.randn(3, INNER), torch.randn(3, HIDDEN)
    norm, last = RMSNorm(WHOLE, HIDDEN, 1e-6), Linear(WHOLE, HIDDEN, {"y": 5})
    norm.weight.normal_()
    last.weight.normal_()
    expected = [*norm.add(whole(x), residual), last(norm.add(whole(x), residual)[0])]

    def work(parallel: ParallelContext) -> list[torch.Tensor]:
        layer = LAYERS["rows"](replace(WHOLE, parallel=parallel))
        load_weights(folder, layer.weights("x."))
        own = x.chunk(2, -1)[parallel.rank]
        assert isinstance(layer.partials(own), RankPartials) == in_norm
        normed, total = norm.add(layer.partials(own), residual)
        y, same_total = last.norm_linear(norm, layer.partials(own), residual)
        assert torch.equal(same_total, total)
        return [normed, total, y]

    for result in on_ranks(2, work, in_norm=in_norm):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("in_norm", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_and_head(size: int, in_norm: bool, tmp_path: Path) -> None:
    whole = Embedding(WHOLE, VOCAB, HIDDEN)
    whole.weight.normal_()
    save_file({"x": whole.weight}, tmp_path / "model.safetensors")
    token_ids, hidden = torch.randperm(VOCAB), torch.randn(3, HIDDEN)

    def work(parallel: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
        layer = Embedding(replace(WHOLE, parallel=parallel), VOCAB, HIDDEN)
        assert len(layer.weight) == VOCAB // size
        load_weights(tmp_path, layer.weights("x"))
        norm = RMSNorm(replace(WHOLE, parallel=parallel), HIDDEN, 1e-6)
        norm.weight.fill_(1)
        x, residual = layer.partials(token_ids)
        assert isinstance(x, RankPartials) == (in_norm and size > 1)
        torch.testing.assert_close(norm.add(x, residual)[1], layer(token_ids))
        return layer(token_ids), parallel.all_gather(layer.logits(hidden))

    for vectors, logits in on_ranks(size, work, in_norm=in_norm):
        torch.testing.assert_close(vectors, whole(token_ids))
        torch.testing.assert_close(logits, whole.logits(hidden))


def test_dummy_weights_are_the_same_however_they_are_split() -> None:
    def fill(parallel: ParallelContext) -> torch.Tensor:
        layer = GatedLinear(replace(WHOLE, parallel=parallel), HIDDEN, {"gate": INNER, "up": INNER})
        fill_random(layer.weights(""), seed=3)
        return layer.weight

    (whole,) = on_ranks(1, fill)
    gates, ups = zip(*(weight.chunk(2) for weight in on_ranks(2, fill)), strict=True)
    assert torch.equal(torch.cat((*gates, *ups)), whole)


def test_a_shard_knows_the_whole() -> None:
    shard = Shard(torch.empty(4, 3), 1, Share(6, 3, 9))
    assert shard.whole_shape == [4, 9]
    assert torch.equal(torch.arange(36).view(4, 9)[shard.index], torch.arange(36).view(4, 9)[:, 6:])


@pytest.mark.parametrize(
    ("size", "make", "sentence"),
    [
        (3, LAYERS["qkv8"], "is 3, but the model's 8 query heads can't be split evenly over so many ranks; 2 would do"),
        (8, lambda c: QKVLinear(c, HIDDEN, 16, 6, HEAD_DIM), "is 8, but the model's 6 KV heads can't be split evenly"),
        (5, LAYERS["gated"], "the model's 32 outputs of gate can't"),
        (5, LAYERS["rows"], "the model's 32 inputs of a can't"),
        (16, lambda c: Embedding(c, VOCAB, HIDDEN), "the model's 40 tokens of the vocabulary can't"),
    ],
)
def test_sizes_that_do_not_divide(size: int, make: Callable[[ModelContext], object], sentence: str) -> None:
    with raises_sentence(ConfigError, sentence):
        make(replace(WHOLE, parallel=ParallelContext(1, size)))
