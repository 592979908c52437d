"""Checkpoints that are missing, corrupt, incomplete or strange: one sentence each that says what would be right."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoflow import LLM, SamplingParams
from nanoflow.core.config.errors import CheckpointError, ConfigError, PluginError
from nanoflow.core.loading.generation_config import eos_token_ids
from nanoflow.testing.checkpoints import edit_json
from tests.core.checkpoints import Oracle
from tests.core.running import check, greedy
from tests.core.sentences import raises_sentence

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(oracle: Oracle, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(oracle("plain").folder, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(oracle: Oracle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(oracle("sharded").folder, tmp_path / "checkpoint"))


def load(folder: Path | str, **options: Any) -> LLM:
    return LLM(str(folder), num_kv_blocks=64, **options)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_no_such_folder(tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, "no/such/folder' does not exist"):
        load(tmp_path / "no/such/folder")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with raises_sentence(CheckpointError, "is a file; name the folder"):
        load(folder / WEIGHTS)


@pytest.mark.parametrize("name", ["somebody/some-model", "some-model"])
def test_hub_id_without_a_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with raises_sentence(CheckpointError, f"'{name}' is not a folder here and could not be had from the Hub"):
        load(name)


def test_a_gated_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: Any, **options: Any) -> str:
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with raises_sentence(CheckpointError, "'somebody/some-model' is gated; accept its terms", "`hf auth login`"):
        load("somebody/some-model")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with raises_sentence(CheckpointError, "config.json is missing; a checkpoint is a folder with config.json"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", '{"architectures": ["Qwen3ForCausalLM"],}', "\0\1"])
def test_corrupt_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with raises_sentence(CheckpointError, "config.json can't be read as JSON"):
        load(folder)


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with raises_sentence(CheckpointError, "config.json holds no JSON object"):
        load(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_config_lacks_a_key(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", lambda c: c.pop(key))
    with raises_sentence(CheckpointError, f"config.json has no '{key}'"):
        load(folder)


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None])
def test_architecture_that_no_plugin_serves(folder: Path, architectures: list[str] | None) -> None:
    edit_json(folder / "config.json", lambda c: c.update(architectures=architectures))
    with raises_sentence(PluginError, "No model plugin serves this", "served are: LlamaForCausalLM, ", "plugins new"):
        load(folder)
    with raises_sentence(PluginError, "model=qwen3 serves Qwen3ForCausalLM, but the checkpoint is of"):
        load(folder, model="qwen3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
    ],
)
def test_config_asks_for_what_is_not_served(folder: Path, change: dict[str, Any], words: str) -> None:
    edit_json(folder / "config.json", lambda c: c.update(change))
    with raises_sentence(CheckpointError, words):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_corrupt_weights(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with raises_sentence(CheckpointError, "model.safetensors is not a readable safetensors file", "copy it again"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with raises_sentence(CheckpointError, "no *.safetensors files", "load_format=dummy"):
        load(folder)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with raises_sentence(CheckpointError, f"{shard.name} is missing, though {INDEX} names it"):
        load(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 5}'])
def test_index_without_a_map(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with raises_sentence(CheckpointError, "has no weight_map"):
        load(sharded)


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with raises_sentence(CheckpointError, "lacks 1 tensor", "model.layers.1.self_attn.k_proj.weight"):
        load(folder)


def test_unknown_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(2)}))
    with raises_sentence(CheckpointError, "holds 'model.layers.0.extra', which the model has no place for"):
        load(folder)


def test_more_layers_than_the_config_says(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=1, layer_types=None))
    with raises_sentence(CheckpointError, "holds 'model.layers.1.", "no place for"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    with raises_sentence(CheckpointError, "'model.norm.weight' has shape [7], but config.json asks for [48]"):
        load(folder)


def test_old_rotary_buffers_are_passed_over(folder: Path, oracle: Oracle) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    check(load(folder), oracle("plain"), [0, 1])


def test_a_tied_checkpoint_may_hold_the_head_too(oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle("tied").folder, tmp_path / "checkpoint"))
    edit_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(load(folder), oracle("tied"), [0, 1])


@pytest.mark.parametrize("said", [True, None])
def test_a_head_unlike_the_embedding_is_used_whatever_the_config_says(
    oracle: Oracle, tmp_path: Path, said: bool | None
) -> None:
    folder = Path(shutil.copytree(oracle("plain").folder, tmp_path / "checkpoint"))
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=said))
    with pytest.warns(UserWarning, match="is unlike its token embedding") if said else nullcontext():
        llm = load(folder, dtype="float32")
    check(llm, oracle("plain"), [0, 1])


def test_a_table_that_is_shared_may_be_stored_as_the_head(oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle("tied").folder, tmp_path / "checkpoint"))
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    check(load(folder), oracle("tied"), [0, 1])


def test_a_head_of_its_own_must_be_stored(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with raises_sentence(CheckpointError, "lacks 1 tensor", "lm_head.weight"):
        load(folder)


def test_weights_are_converted(folder: Path) -> None:
    """A checkpoint in bfloat16 runs in float32, from the same numbers."""
    edit_weights(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    llm = load(folder, dtype="float32")
    assert llm.describe()["dtype"] == "float32"
    llm.generate([[1, 2]], greedy(4), use_tqdm=False)


def test_dummy_weights_need_the_config_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()

    def answer(seed: int) -> list[int]:
        llm = load(folder, load_format="dummy", seed=seed)
        return llm.generate([[1, 2, 3]], greedy(8), use_tqdm=False)[0]["token_ids"]

    assert answer(0) == answer(0)
    assert len({tuple(answer(seed)) for seed in (0, 1, -5)}) == 3


def test_dummy_weights_take_any_seed(folder: Path) -> None:
    load(folder, load_format="dummy", seed=2**70)


def test_corrupt_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with raises_sentence(CheckpointError, "generation_config.json can't be read as JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(None, None, set()), (3, None, {3}), ([3, 4], None, {3, 4}), (3, [4, 5], {3, 4, 5}), (0, None, {0})],
)
def test_end_of_sequence_ids(tmp_path: Path, config: Any, generation: Any, expected: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert eos_token_ids(tmp_path, {"eos_token_id": config}, 128) == expected


@pytest.mark.parametrize("strange", [128, 128 + 3, -1, 2**70, 1.5, "16", True, {"a": 3}])
def test_end_of_sequence_ids_that_cannot_be_generated(folder: Path, oracle: Oracle, strange: Any) -> None:
    """They are no ids of another request's either, whose logits lie behind."""
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, lambda values: values.update(eos_token_id=[0, strange]))
    with pytest.warns(UserWarning, match=r"end-of-sequence id .* is left out, for .* integers from 0 to 127\."):
        llm = load(folder, dtype="float32")
    reference = oracle("plain")
    params = [greedy(20, ignore_eos=False, min_tokens=20), greedy(20, repetition_penalty=1.0000001)]
    outputs = llm.generate(reference.prompts[3:5], params, use_tqdm=False)
    assert outputs[1]["token_ids"] == reference.outputs[4]
    with pytest.warns(UserWarning, match="is left out"):
        assert eos_token_ids(folder, {"eos_token_id": strange}, 128, strange) == {0}


GENERATION = {
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 5,
    "do_sample": True, "eos_token_id": 3,
}  # fmt: skip


def test_default_sampling_parameters(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    llm = load(folder)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1, max_tokens=5
    )
    assert 1 <= len(llm.generate([1, 2, 3], use_tqdm=False)[0]["token_ids"]) <= 5
    assert load(folder, generation_config="none").get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize("said", [None, {}, {"temperature": None, "do_sample": False}])
def test_sampling_parameters_that_are_not_said(folder: Path, said: dict[str, Any] | None) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
    assert load(folder).get_default_sampling_params() == SamplingParams()


def test_sampling_parameters_out_of_range(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(GENERATION | {"top_p": 7}))
    with raises_sentence(CheckpointError, "generation_config.json: top_p must be a number in (0, 1], got 7."):
        load(folder)
    load(folder, generation_config="none")


def test_more_positions_than_the_model_has(folder: Path) -> None:
    with raises_sentence(ConfigError, "max_model_len is 257", "at most 256"):
        load(folder, max_model_len=257)
