"""Values of config.json that can't be: one sentence that names the key, in bounded time and memory."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM
from nanoflow.core.config.errors import CheckpointError, ConfigError, NanoflowError
from nanoflow.core.execution.plan import MOST_UNASKED, pick_dtype, pick_max_model_len
from nanoflow.core.layers.activation import require_silu
from nanoflow.core.layers.decoder_config import BOOLEANS, INTEGERS, completed
from nanoflow.core.loading.hf_config import HFConfig, read_config
from nanoflow.testing.checkpoints import edit_json
from tests.core.checkpoints import Oracle
from tests.core.sentences import raises_sentence

GOOD = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_INTEGERS = ["48", 1.5, 48.0, True, [48], {}, -1, 10**9, 10**400, -(10**5000)]


@pytest.fixture
def folder(oracle: Oracle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(oracle("plain").folder, tmp_path / "checkpoint"))


@pytest.mark.parametrize("value", NO_INTEGERS, ids=range(len(NO_INTEGERS)))
@pytest.mark.parametrize("key", [key for key in INTEGERS if INTEGERS[key][1] < 10**9])
def test_integers(key: str, value: Any) -> None:
    with raises_sentence(CheckpointError, f"config.json: {key} must be an integer from"):
        completed({**GOOD, key: value}, {})


@pytest.mark.parametrize("value", ["true", 1, 0, [True], 1.0])
@pytest.mark.parametrize("key", BOOLEANS)
def test_switches(key: str, value: Any) -> None:
    with raises_sentence(CheckpointError, f"config.json: {key} must be true or false"):
        completed({**GOOD, key: value}, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number >= 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number >= 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number >= 0"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of integers"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4, which is no multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": 8}, "no multiple of num_key_value_heads=8"),
        ({"head_dim": 15}, "heads of 15 numbers each"),
        ({"hidden_size": 4}, "heads of 1 numbers each"),
        ({"hidden_size": 2}, "heads of 0 numbers each"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of num_hidden_layers=2 names"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of num_hidden_layers=2 names"),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types must be of full_attention and sliding_attention"),
        ({"layer_types": [1, 2]}, "layer_types must be of full_attention and sliding_attention"),
        ({"sliding_window": 0}, "sliding_window must be an integer from 1"),
    ],
)
def test_other_values(change: dict[str, Any], words: str) -> None:
    with raises_sentence(CheckpointError, words):
        completed({**GOOD, **change}, {})


def test_null_is_left_out_except_where_it_means_none() -> None:
    defaults = {"sliding_window": 4096, "use_sliding_window": True, "num_key_value_heads": 2}
    nulls = dict.fromkeys(("sliding_window", "use_sliding_window", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    result = completed(HFConfig(GOOD | nulls), defaults)
    assert isinstance(result, HFConfig)
    assert result["sliding_window"] is None
    assert (result["use_sliding_window"], result["num_key_value_heads"], result["head_dim"]) == (True, 2, 12)
    assert completed(GOOD, defaults)["sliding_window"] == 4096
    assert completed(GOOD, {})["num_key_value_heads"] == 4


def test_activations() -> None:
    for name in ("silu", "swish"):
        require_silu({"hidden_act": name})
    for value in ("gelu", 5, ["silu"]):
        with raises_sentence(CheckpointError, f"hidden_act is {value!r}"):
            require_silu({"hidden_act": value})


ODD_VALUES: list[dict[str, Any]] = [
    *({key: value} for key in ("num_hidden_layers", "max_position_embeddings", "vocab_size", "hidden_size", "head_dim",
                               "num_attention_heads", "intermediate_size") for value in (10**9, 2**63, 10**400, 0)),
    {"hidden_size": None}, {"num_attention_heads": None}, {"max_position_embeddings": None}, {"vocab_size": None},
    *({"architectures": value} for value in (5, "Qwen3ForCausalLM", [5], {"a": 1}, [["a"]])),
    {"max_position_embeddings": "256"}, {"max_position_embeddings": 256.0}, {"vocab_size": 2**24, "hidden_size": 2**17},
    {"rope_parameters": 5}, {"rope_parameters": [1]}, {"rope_parameters": {"rope_theta": "1e4"}},
    {"rope_parameters": {"rope_theta": 10**400}}, {"rope_parameters": {"rope_theta": 0}},
    {"rope_parameters": {"rope_type": ["yarn"]}}, {"rope_parameters": {"rope_type": "yarn", "factor": "4"}},
    {"layer_types": ["full_attention"] * 10**6}, {"per_layer_config": {"0": {"hidden_size": 3}}},
]  # fmt: skip


@pytest.mark.parametrize("change", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_engines_refuse_soon(folder: Path, change: dict[str, Any]) -> None:
    """No plugin is blamed, and nothing large is made meanwhile."""
    edit_json(folder / "config.json", lambda c: c.update(change))
    start = time.process_time()
    too_large = change.get("vocab_size") == 2**24
    with raises_sentence(
        ConfigError if too_large else CheckpointError, *([] if "vocab_size" in change else [next(iter(change))[:4]])
    ):
        LLM(str(folder), num_kv_blocks=8)
    assert time.process_time() - start < 5


QUANTIZED: list[tuple[Any, str]] = [
    ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8"}, "fp8"), ({"quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "awq"}, "awq"), ({"load_in_4bit": True}, "bitsandbytes"), ({"format": "pack-quantized"}, "pack-"),
    ({"bits": 4}, "does not name"), ("int8", "int8"), ({"quant_method": {"a": 1}}, "does not name"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "name"), QUANTIZED)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_checkpoints_are_refused_by_name(folder: Path, key: str, said: Any, name: str) -> None:
    edit_json(folder / "config.json", lambda c: c.update({key: said}))
    with raises_sentence(CheckpointError, "is quantized", name, "original checkpoint"):
        LLM(str(folder), num_kv_blocks=8)


@pytest.mark.parametrize("said", [None, {}])
def test_no_quantization(folder: Path, said: Any) -> None:
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=said))
    assert read_config(folder)["hidden_size"] == 48


DTYPES = {
    "bfloat16": ["bfloat16", "torch.bfloat16", "bf16", "BF16", "BFloat16", "float32", "torch.float32", "float", "fp32",
                 "double", "float64", "auto", None],
    "float16": ["float16", "torch.float16", "half", "fp16", "torch.half"],
}  # fmt: skip


@pytest.mark.parametrize(("expected", "said"), [(dtype, said) for dtype, names in DTYPES.items() for said in names])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_in_any_words(key: str, said: str | None, expected: str) -> None:
    config = {key: said}
    assert pick_dtype("auto", config, torch.device("cuda")) == getattr(torch, expected)
    assert pick_dtype("auto", config, torch.device("cpu")) == torch.float32
    assert pick_dtype("float16", config, torch.device("cuda")) == torch.float16


def test_dtype_goes_before_torch_dtype() -> None:
    cuda = torch.device("cuda")
    assert pick_dtype("auto", {"dtype": "half", "torch_dtype": "bfloat16"}, cuda) == torch.float16
    assert pick_dtype("auto", {"dtype": None, "torch_dtype": "half"}, cuda) == torch.float16


@pytest.mark.parametrize("said", ["int8", "float8_e4m3fn", "nn", "", 5, ["float16"], {"": "float16"}, "__name__"])
def test_no_dtypes(said: Any) -> None:
    with raises_sentence(CheckpointError, "config.json says dtype=", "set engine.dtype"):
        pick_dtype("auto", {"dtype": said}, torch.device("cuda"))
    assert pick_dtype("bfloat16", {"dtype": said}, torch.device("cuda")) == torch.bfloat16


def test_long_contexts_are_asked_for() -> None:
    config = {"max_position_embeddings": 10**9}
    with raises_sentence(CheckpointError, "max_position_embeddings=1000000000", "engine.max_model_len", "16,777,216"):
        pick_max_model_len(None, config, "max_position_embeddings")
    assert pick_max_model_len(2**24, config, "max_position_embeddings") == 2**24
    with pytest.raises(NanoflowError, match="at most 16777216"):
        pick_max_model_len(2**24 + 1, config, "max_position_embeddings")
    assert pick_max_model_len(None, {"n": MOST_UNASKED}, "n") == MOST_UNASKED


def test_an_own_key_for_positions() -> None:
    for value in ("9", 0, None, 1.0):
        with raises_sentence(CheckpointError, "n_positions must be an integer >= 1"):
            pick_max_model_len(None, {"n_positions": value}, "n_positions")


def test_sliding_layers_without_a_window(folder: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    for change in ({"use_sliding_window": False}, {"use_sliding_window": True, "sliding_window": None}):
        edit_json(folder / "config.json", lambda c, change=change: c.update(change, layer_types=types))
        with raises_sentence(CheckpointError, "has sliding_attention in layer_types"):
            LLM(str(folder), num_kv_blocks=8)


def test_more_chosen_experts_than_there_are(oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle("qwen3_moe").folder, tmp_path / "checkpoint"))
    edit_json(folder / "config.json", lambda c: c.update(num_experts_per_tok=8))
    with raises_sentence(CheckpointError, "num_experts_per_tok=8 of 7 experts"):
        LLM(str(folder), num_kv_blocks=8)


ANY: list[Any] = [
    None, "", "x", "16", 0, -1, 1, 2, 3, 7, 1.5, 1e308, float("nan"), float("inf"), 10**9, 2**63, 10**400, True, False,
    [], [1], ["a"], [None], {}, {"a": 1}, {"rope_type": "yarn"}, {"factor": -1}, "a" * 10_000, [[[]]], "\ud800", "\n",
]  # fmt: skip
MORE_KEYS = (
    "sliding_window", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "layer_types", "torch_dtype", "transformers_weights", "num_local_experts", "mlp_only_layers",
)  # fmt: skip


def refusal(folder: Path) -> str | None:
    """Why no engine can be built; None if one can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LLM(str(folder), num_kv_blocks=8).close()
    except NanoflowError as error:
        return str(error)
    return None


@pytest.mark.parametrize("num_values", [3, pytest.param(len(ANY), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["plain", "llama", "mistral", "qwen3_moe"])
def test_any_value_is_served_or_refused(name: str, num_values: int, oracle: Oracle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(oracle(name).folder, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    draw = random.Random(num_values)
    answers: list[str | None] = []
    for key in dict.fromkeys([*config, *MORE_KEYS]):
        for value in draw.sample(ANY, num_values):
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            answers.append(refusal(folder))
            assert answers[-1] is None or "could not be built" not in answers[-1], f"{key}={value}: {answers[-1]}"
            assert len(answers[-1] or "") < 700, f"{key}={value}: {answers[-1]}"
    assert 0 < answers.count(None) < len(answers)


def test_an_adapters_folder_inside_is_no_matter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    assert read_config(folder)["hidden_size"] == 48
