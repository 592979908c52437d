"""Rotary settings as transformers merges them, wherever they stand, and how far they reach."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.execution.plan import pick_max_model_len
from nanoflow.core.layers.rope_settings import inverse_frequencies, rope_parameters, stretched_length
from tests.core.sentences import raises_sentence

HEAD_DIM = 16
POSITIONS = {"max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS: list[dict[str, Any] | None] = [
    None, {}, {"rope_type": "default"}, {"rope_theta": 300.0}, {"type": "linear", "factor": 2.0}, YARN, LLAMA3,
    {"type": "default", "rope_type": "linear", "factor": 3}, YARN | {"original_max_position_embeddings": 16},
    YARN | {"attention_factor": 0.7, "beta_fast": 8, "truncate": False}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    YARN | {"factor": None, "original_max_position_embeddings": 16}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5}, LLAMA3 | {"original_max_position_embeddings": 32},
]  # fmt: skip
ON_TOP: list[dict[str, Any]] = [
    {}, {"rope_theta": 500.0}, {"original_max_position_embeddings": 24}, {"partial_rotary_factor": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("older", SETTINGS)
def test_settings_in_two_places(older: dict[str, Any] | None) -> None:
    for newer, on_top in itertools.product(SETTINGS, ON_TOP):
        places = {"rope_scaling": older, "rope_parameters": newer}
        config = {**POSITIONS, **on_top, **{key: value for key, value in places.items() if value is not None}}
        theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, **deepcopy(config)))
        inv_freq, factor = inverse_frequencies(config, HEAD_DIM)
        torch.testing.assert_close(inv_freq, theirs.inv_freq)
        assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not supported; supported are: default, "),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type 'mrope' is not supported"),
        ({"rope_type": 5}, "rope_type 5 is not supported"),
        ({"rope_type": ["a"]}, "rope_type ['a'] is not supported"),
        ({"rope_type": "linear"}, "lack 'factor'"),
        ({"rope_type": "linear", "factor": None}, "lack 'factor'"),
        ({"rope_type": "yarn"}, "lack 'factor'"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "lack 'high_freq_factor'"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA3 | {"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a number > 0, got '2'"),
        ({"rope_type": "linear", "factor": 0}, "factor must be a number > 0"),
        ({"rope_theta": -5}, "rope_theta must be a number > 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number > 0"),
        ({"rope_theta": 10**400}, "rope_theta must be a number > 0"),
        (YARN | {"rope_theta": 1}, "of type 'yarn', can't be used (ZeroDivisionError"),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e308}, ""),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 5}}, "by kinds of layers"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    if not words:
        assert inverse_frequencies(POSITIONS | {"rope_parameters": settings}, HEAD_DIM)[0].isfinite().all()
        return
    for key in ("rope_parameters", "rope_scaling"):
        with raises_sentence(CheckpointError, "rope", words):
            inverse_frequencies(POSITIONS | {key: settings}, HEAD_DIM)


@pytest.mark.parametrize("value", [5, "yarn", [1], True])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_settings_that_are_none(key: str, value: Any) -> None:
    with raises_sentence(CheckpointError, f"{key}={value!r}", "no JSON object"):
        rope_parameters({key: value})


@pytest.mark.parametrize("theta", ["1e4", 0, [1], float("nan")])
def test_a_theta_that_is_none(theta: Any) -> None:
    with raises_sentence(CheckpointError, "rope_theta must be a number > 0"):
        rope_parameters({"rope_theta": theta})


def test_a_part_of_each_head_by_default() -> None:
    """transformers' models of these kinds rotate the whole head then, whatever the config says."""
    settings = {"rope_type": "default", "partial_rotary_factor": 0.5}
    whole = inverse_frequencies({"rope_parameters": {"rope_type": "default"}}, HEAD_DIM)[0]
    assert torch.equal(inverse_frequencies({"rope_parameters": settings}, HEAD_DIM)[0], whole)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 64),
        ({"rope_type": "default", "factor": 4.0}, 64),
        (YARN, 256),  # the original length is that of the model
        (YARN | {"original_max_position_embeddings": 64}, 256),
        (YARN | {"original_max_position_embeddings": 16}, 64),  # stretched already
        (YARN | {"original_max_position_embeddings": 8}, 64),
        (YARN | {"factor": 2.5}, 160),
        ({"type": "linear", "factor": 2}, 128),
        ({"type": "dynamic", "factor": 2.0}, 64),
        (LLAMA3, 64),
        ({"rope_type": "longrope", "factor": 4.0}, 64),
    ],
)
def test_how_long_sequences_may_be(settings: dict[str, Any], length: int) -> None:
    config = POSITIONS | {"rope_scaling": settings}
    assert stretched_length(config, 64) == length
    assert pick_max_model_len(None, config, "max_position_embeddings") == length
    assert pick_max_model_len(length, config, "max_position_embeddings") == length
    with pytest.raises(ValueError, match=f"at most {length} tokens"):
        pick_max_model_len(length + 1, config, "max_position_embeddings")
