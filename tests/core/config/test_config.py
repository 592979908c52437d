"""The config dataclasses check themselves."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import SamplingParams, StructuredOutputsParams
from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice, SchedulerConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import RequestOutputKind
from tests.core.sentences import raises_sentence

NAN, INF = float("nan"), float("inf")

SAMPLING_REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, None, "1", True],
    "output_kind": ["delta", "", None, 0, True, ["DELTA"]],
    "temperature": [-1, -1e-9, NAN, INF, "0", None, True, [1.0]],
    "top_p": [0, 0.0, -0.1, 1.5, NAN, "1", None, True],
    "top_k": [-2, 1.5, "5", None, True, NAN],
    "min_p": [-0.1, 1.1, NAN, "0", None, False],
    "repetition_penalty": [0, -1, NAN, INF, "1", None, True],
    "presence_penalty": [-2.1, 2.1, NAN, "0", None, True],
    "frequency_penalty": [-2.1, 2.1, NAN, "0", None, True],
    "logit_bias": [{-1: 1.0}, {1.5: 1}, {"a": 1}, {True: 1}, {1: 101}, {1: -100.5}, {1: NAN}, {1: "1"}, [1], 5],
    "allowed_token_ids": [[], (), [-1], [1.5], ["1"], [True], 5, "12"],
    "bad_words": [[""], ["  "], [5], "word", ["a", None], 5],
    "seed": [1.5, "1", True, NAN],
    "max_tokens": [0, -1, 1.5, "5", True, NAN, INF],
    "min_tokens": [-1, 1.5, None, "1", True, NAN],
    "stop": ["", [""], 5, [5], ["a", None], b"a", {"a": 1}],
    "stop_token_ids": [5, [-1], [1.5], ["1"], [True], "12"],
    "ignore_eos": [0, 1, None, "true"],
    "include_stop_str_in_output": [0, 1, None, "true"],
    "logprobs": [-2, 1.5, "5", True, NAN],
    "prompt_logprobs": [-2, 1.5, "5", True, NAN],
    "prompt_logprobs_start": [-1, 1.5, "5", True, None],
    "detokenize": [0, 1, None, "true"],
    "skip_special_tokens": [0, 1, None, "true"],
    "truncate_prompt_tokens": [0, -2, 1.5, "5", True, NAN],
    "cache_salt": ["", 3, b"a", "\ud800"],
    "priority": [1.5, "1", None, True],
    "structured_outputs": ["a+", {"regex": "a+"}, True],
    "logits_processors": ["name", ["name"], {"name": 5}, {5: {}}, True],
}
STRUCTURED_REFUSED: dict[str, list[Any]] = {
    "json": ["{", "[1]", "null", 5, [1], b"{}", {"a": {1, 2}}],
    "regex": ["", 5, ["a"], b"a"],
    "choice": [[], [""], "a", 5, [5], ["a", None]],
    "grammar": ["", 5, ["a"]],
    "json_object": [0, 1, None, "true"],
}
SAMPLING_TAKEN: dict[str, list[Any]] = {
    "n": [1, 100],
    "output_kind": [*RequestOutputKind, "CUMULATIVE", "DELTA", "FINAL_ONLY"],
    "temperature": [0, 0.0, 1, 0.7, 100],
    "top_p": [1, 1.0, 0.5, 1e-3],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [1, 1.0, 0.5, 1e-9, 100],
    "presence_penalty": [0, -2, 2, 0.5],
    "frequency_penalty": [0, -2, 2, 0.5],
    "logit_bias": [None, {}, {0: 1}, {5: -100, 6: 100.0}],
    "allowed_token_ids": [None, [0], (1, 2)],
    "bad_words": [None, [], ["a", " b c"]],
    "seed": [None, 0, -1, 2**64],
    "max_tokens": [None, 1, 10**9],
    "min_tokens": [0, 16],
    "stop": [None, [], ["a"], "a", ("a", "b"), ["\n"]],
    "stop_token_ids": [None, [], [0], (1, 2)],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "logprobs": [None, 0, 1, -1, 10**9],
    "prompt_logprobs": [None, 0, 1, -1, 10**9],
    "prompt_logprobs_start": [0, 1, 10**9],
    "detokenize": [True, False],
    "skip_special_tokens": [True, False],
    "truncate_prompt_tokens": [None, 1, -1, 10**9],
    "cache_salt": [None, "é 1"],
    "priority": [0, -5, 10**9],
    "structured_outputs": [None, StructuredOutputsParams(regex="a+")],
    "logits_processors": [None, {}, {"name": {}, "other": {"of": [1]}}],
}
LIMITS = [
    "max_n", "max_logprobs", "max_prompt_logprobs", "max_logit_bias", "max_stop", "max_bad_words", "max_text_length",
    "max_grammar_length", "max_queued_requests", "max_queued_tokens",
]  # fmt: skip
ENGINE_REFUSED: dict[str, list[Any]] = {
    "dtype": ["float64", "fp16", None, "", 16],
    "load_format": ["safetensors", None, ""],
    "generation_config": ["vllm", None, "", True],
    "seed": [1.5, None, "0", True],
    "max_model_len": [0, -1, 1.5, "100", True],
    "block_size": [0, -1, 1.5, None, "16", True],
    "num_kv_blocks": [0, -1, 1.5, "1", True],
    "kv_cache_gib": [0, -1, NAN, INF, "1", True],
    "gpu_memory_utilization": [0, -0.1, 1.1, NAN, None, "0.9", True],
    "accelerate": [0, None, "true"],
    "enforce_eager": [0, None, "true"],
    "num_threads": [0, -1, 1.5, "2", True],
    "freeze_gc": [0, None, "true"],
    "debug": [0, None, "true"],
    "tensor_parallel_size": [0, -1, 1.5, None, "2", True],
    "one_shot_kib": [-1, 1.5, "64", True],
    "graph_sizes": [[], [0], [1.5], 8, "8"],
    "graph_tokens": [[0], [1.5], 8, "8"],
    "overlap": [0, 1, "true"],
    "revision": ["", 5, True, ["main"]],
    "tokenizer": ["", 5, True, ["a/b"]],
    "device": [None, 0, 1.5, True],
    "max_prompt_bytes": [0, -1, 1.5, "100", True],
    **{key: [0, -1, 1.5, "100", True, None] for key in LIMITS},
}
ENGINE_TAKEN: dict[str, list[Any]] = {
    "dtype": ["auto", "float32", "float16", "bfloat16"],
    "load_format": ["auto", "dummy"],
    "generation_config": ["auto", "none"],
    "seed": [0, -1, 2**70],
    "max_model_len": [None, 1],
    "block_size": [1, 16, 17],
    "num_kv_blocks": [None, 1],
    "kv_cache_gib": [None, 1, 0.5],
    "gpu_memory_utilization": [1, 0.5],
    "accelerate": [True, False],
    "enforce_eager": [True, False],
    "tensor_parallel_size": [1, 2, 3],
    "one_shot_kib": [None, 0, 512],
    "graph_sizes": [None, [1], [4, 2]],
    "graph_tokens": [None, [], [64, 32]],
    "num_threads": [None, 1, 64],
    "freeze_gc": [True, False],
    "overlap": [None, True, False],
    "revision": [None, "main"],
    "tokenizer": [None, "a/b"],
    "device": ["auto", "cpu", "cuda", "cuda:1"],
    "max_prompt_bytes": [None, 1],
    **{key: [1, 2**70] for key in LIMITS},
}


def cases(values: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, row in values.items() for value in row]


@pytest.mark.parametrize(("name", "value"), cases(SAMPLING_REFUSED))
def test_sampling_refuses(name: str, value: Any) -> None:
    shown = [value] if name == "stop" and value == "" else value
    with raises_sentence(ConfigError, f"{name} must be ", f"got {shown!r}."):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(SAMPLING_TAKEN))
def test_sampling_takes(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == (["a"] if value == "a" else value)


@pytest.mark.parametrize(("name", "value"), cases(STRUCTURED_REFUSED))
def test_structured_outputs_refuse(name: str, value: Any) -> None:
    with raises_sentence(ConfigError, f"{name} must be ", f"got {value!r}."):
        StructuredOutputsParams(**{name: value})


def test_structured_outputs_are_of_one_kind() -> None:
    for given in ({}, {"regex": "a", "choice": ["a"]}, {"json": "{}", "grammar": "a", "json_object": True}):
        with raises_sentence(ConfigError, "structured_outputs must have exactly one of", *given):
            StructuredOutputsParams(**given)


def test_a_schema_may_come_from_a_model() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "string"}

    assert StructuredOutputsParams(json=Model).json == StructuredOutputsParams(json=Model()).json == {"type": "string"}


@pytest.mark.parametrize(("name", "value"), cases(ENGINE_REFUSED))
def test_engine_refuses(name: str, value: Any) -> None:
    """The device is looked for when the engine is built; everything else is known to be wrong at once."""
    from nanoflow.core.execution.plan import pick_device

    with raises_sentence(ConfigError, f"engine.{name} must be ", f"got {value!r}."):
        pick_device(EngineConfig(**{name: value}).device)


@pytest.mark.parametrize(("name", "value"), cases(ENGINE_TAKEN))
def test_engine_takes(name: str, value: Any) -> None:
    assert getattr(EngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases({name: [0, -1, 1.5, "4", True, NAN] for name in ("max_num_seqs", "max_num_batched_tokens")}),
        ("max_num_seqs", None),
    ],
)
def test_scheduler_refuses(name: str, value: Any) -> None:
    with raises_sentence(ConfigError, f"scheduler.{name} must be an integer >= ", f"got {value!r}."):
        SchedulerConfig(**{name: value})


def test_a_budget_below_the_batch_size() -> None:
    SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8)
    with raises_sentence(ConfigError, "max_num_batched_tokens must be an integer >= max_num_seqs (8)", "got 7."):
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=7)


def test_min_tokens_above_max_tokens() -> None:
    with raises_sentence(ConfigError, "min_tokens must be at most max_tokens (4), got 5."):
        SamplingParams(max_tokens=4, min_tokens=5)
    SamplingParams(max_tokens=None, min_tokens=500)


def test_stop_strings_need_text() -> None:
    with raises_sentence(ConfigError, "detokenize must be true where there are stop strings, got False."):
        SamplingParams(stop="a", detokenize=False)


def test_json_keys_of_a_logit_bias() -> None:
    assert SamplingParams(logit_bias={"5": 1.0}).logit_bias == {5: 1.0}


@pytest.mark.parametrize("config", [SamplingParams, StructuredOutputsParams, EngineConfig, SchedulerConfig])
def test_every_option_is_checked_and_has_a_help_line(config: type) -> None:
    checked = {
        SamplingParams: SAMPLING_REFUSED, StructuredOutputsParams: STRUCTURED_REFUSED, EngineConfig: ENGINE_REFUSED,
    }.get(config)  # fmt: skip
    for field in dataclasses.fields(config):
        assert field.metadata["help"], field.name
        assert "\n" not in field.metadata["help"]
        assert checked is None or field.name in checked
    instance = config(regex="a") if config is StructuredOutputsParams else config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, dataclasses.fields(config)[0].name, 1)


def test_names_and_defaults_follow_vllm() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.ignore_eos) == (16, 0, None, False)
    assert (params.stop, params.stop_token_ids, params.include_stop_str_in_output) == (None, None, False)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == (None, None, None)
    assert (params.logprobs, params.prompt_logprobs, params.truncate_prompt_tokens) == (None, None, None)
    assert (params.detokenize, params.skip_special_tokens) == (True, True)


def test_configs_share_no_state() -> None:
    assert Config().plugins is not Config().plugins
    assert PluginChoice("fcfs").options is not PluginChoice("fcfs").options
    assert Config() == Config()


def test_a_config_by_way_of_json() -> None:
    several = (PluginChoice("a"), PluginChoice("b", {"size": 3}))
    plugins = {"scheduler": PluginChoice("fcfs", {"max_num_seqs": 3}), "watchers": several}
    config = Config("here", EngineConfig(seed=3), plugins)
    assert Config.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_misspelt_field_gets_a_hint() -> None:
    with raises_sentence(ConfigError, "SamplingParams() has no field 'temprature'. Did you mean 'temperature'?"):
        SamplingParams(temprature=1)
    with raises_sentence(ConfigError, "StructuredOutputsParams() has no field 'regexp'. Did you mean 'regex'?"):
        StructuredOutputsParams(regexp="a")
    with raises_sentence(ConfigError, "Did you mean 'temperature'?"):
        dataclasses.replace(SamplingParams(), temprature=1)


def test_clone() -> None:
    params = SamplingParams(stop=["a"], seed=3, logit_bias={1: 2.0})
    other = params.clone(temperature=0.5)
    assert other == dataclasses.replace(params, temperature=0.5)
    assert params.clone() == params
    assert other.stop is not params.stop
    with raises_sentence(ConfigError, "temperature must be a number >= 0, got -1."):
        params.clone(temperature=-1)


def test_setting_a_field_says_how_to_get_another() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError) as caught:
        SamplingParams().temperature = 1  # type: ignore[misc]
    assert str(caught.value) == "A SamplingParams can't be changed; make another by params.clone(temperature=1)."
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"by dataclasses.replace\(params, regex='b'\)\."):
        StructuredOutputsParams(regex="a").regex = "b"  # type: ignore[misc]


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), seed=np.int64(3), logit_bias={np.int64(1): np.float64(2)},
        ignore_eos=np.bool_(True), allowed_token_ids=np.array([1, 2]), stop_token_ids=torch.tensor([5]),
        max_tokens=torch.tensor(4),
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, seed=3, logit_bias={1: 2.0}, ignore_eos=True, allowed_token_ids=[1, 2], stop_token_ids=[5],
        max_tokens=4,
    )  # fmt: skip
    assert {type(value) for value in (params.temperature, params.seed, params.ignore_eos)} == {float, int, bool}


@pytest.mark.parametrize("value", [{"regex": "\ud800"}, {"choice": ["a", "\ud800"]}, {"grammar": "\ud800"},
                                   {"json": {"const": "\ud800"}}, {"json": '{"const": "\\ud800"}'}])  # fmt: skip
def test_structured_outputs_refuse_lone_surrogates(value: dict[str, Any]) -> None:
    with raises_sentence(ConfigError, f"{next(iter(value))} must be "):
        StructuredOutputsParams(**value)


def test_values_are_shown_in_bounded_length() -> None:
    for value in ("x" * 10**6, ["x"] * 10**6, 10**5000, object()):
        with raises_sentence(ConfigError, "top_p must be a number in (0, 1], got "):
            SamplingParams(top_p=value)
        with pytest.raises(ConfigError) as caught:
            SamplingParams(top_p=value)
        assert len(str(caught.value)) < 700
