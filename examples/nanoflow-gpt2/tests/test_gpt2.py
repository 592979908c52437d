"""nanoflow's own tests for models, and what is special about GPT-2."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.plugin import CheckpointError, ConfigError
from nanoflow.testing import ModelArchSuite
from nanoflow.testing.checkpoints import edit_json, generate, make_checkpoint, oracle_of

TINY = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 96}


class TestGPT2(ModelArchSuite):
    component = "gpt2"
    hf_configs = {  # noqa: RUF012
        "tied": TINY,
        "untied": TINY | {"n_inner": 48, "activation_function": "gelu", "tie_word_embeddings": False},
    }


def test_a_checkpoint_of_the_network_without_its_head(tmp_path: Path) -> None:
    """As those of OpenAI are: names begin with `h.`, not `transformer.h.`."""
    network = oracle_of(make_checkpoint(tmp_path, TINY))
    expected, _ = generate(network, [5, 6, 7], 8)
    network.transformer.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(architectures=["GPT2LMHeadModel"]))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(tmp_path), device="cpu", dtype="float32", max_model_len=32) as llm:
        assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] == expected


def test_no_sequence_is_longer_than_there_are_positions(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TINY)
    with LLM(str(tmp_path), device="cpu", num_kv_blocks=16) as llm:
        (output,) = llm.generate([[1] * 120], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
        assert len(output["token_ids"]) == 8
    with pytest.raises(ConfigError, match="at most 128 tokens"):
        LLM(str(tmp_path), max_model_len=129)


@pytest.mark.parametrize(("key", "value"), [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True)])
def test_what_is_not_served_is_refused(key: str, value: object, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TINY)
    edit_json(tmp_path / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        LLM(str(tmp_path), device="cpu")
