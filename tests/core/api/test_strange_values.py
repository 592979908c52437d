"""Whatever is given as an option, a parameter or a prompt: it is served, or refused in one sentence."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.api.options import config_from_options
from nanoflow.core.api.vllm_options import VLLM_OPTIONS
from nanoflow.core.config.engine_config import EngineConfig, SchedulerConfig
from nanoflow.core.config.errors import ConfigError, NanoflowError, RequestError
from nanoflow.core.config.fields import field_names
from nanoflow.core.execution.plan import pick_device
from nanoflow.core.registry.registry import Registry
from tests.core.api.strange_values import draw, random_schema_bomb, strange_values
from tests.core.config.test_config import ENGINE_TAKEN, SAMPLING_TAKEN
from tests.core.running import greedy, tokens

NUM_DRAWS = 5000
REGISTRY = Registry.load()
SCHEMAS = [{}, '{"type": "object"}']
TAKEN: dict[type, dict[str, list[Any]]] = {
    SamplingParams: SAMPLING_TAKEN,
    StructuredOutputsParams: {"json": SCHEMAS, "regex": ["a+"], "choice": [["a", "b"]]},
    EngineConfig: ENGINE_TAKEN,
    SchedulerConfig: {"max_num_seqs": [1, 8], "max_num_batched_tokens": [None, 64]},
}
SAFE = {"max_tokens": [1, 2], "n": [1, 2], "logprobs": [None, 0, 2], "prompt_logprobs": [None, 1]}


def check_sentence(error: NanoflowError) -> None:
    message = str(error)
    message.encode()  # whoever prints it
    assert "\n" not in message, message
    assert " at 0x" not in message, message
    assert message[-1] in ".?", message
    assert len(message) < 2000, message


def made(config: type, values: dict[str, Any]) -> Any:
    """An instance, or None if it was refused in a sentence."""
    try:
        return config(**values)
    except ConfigError as error:
        check_sentence(error)
        return None


@pytest.mark.slow
@pytest.mark.parametrize("config", TAKEN)
def test_every_field_takes_or_refuses_every_value(config: type) -> None:
    for name in field_names(config):
        for make in strange_values():
            made(config, {name: make()})


@pytest.mark.slow
@pytest.mark.parametrize("config", TAKEN)
def test_random_values(config: type) -> None:
    rng = random.Random(0)
    for _ in range(NUM_DRAWS):
        made(config, draw(rng, config, TAKEN[config]))


@pytest.mark.slow
def test_options_of_an_llm() -> None:
    rng = random.Random(3)
    names = [*field_names(EngineConfig), *field_names(SchedulerConfig), *REGISTRY.roles, *VLLM_OPTIONS, "checkpoint"]
    for name in names:
        for make in rng.sample(strange_values(), 8) if name in VLLM_OPTIONS else strange_values():
            options = {name: make()}
            checkpoint = options.pop("checkpoint", None)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    config = config_from_options(REGISTRY, checkpoint, options)
                pick_device(config.engine.device)
            except NanoflowError as error:
                check_sentence(error)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(num_kv_blocks=64) as llm:
        yield llm


def serve(llm: LLM, prompt: Any, params: Any, **options: Any) -> None:
    """Served, or refused in a sentence, and the engine goes on as before."""
    try:
        llm.generate(prompt, params, use_tqdm=False, **options)
    except (RequestError, ConfigError) as error:
        check_sentence(error)


@pytest.mark.slow
def test_random_parameters_are_served_or_refused(llm: LLM) -> None:
    rng, num_made = random.Random(1), 0
    before = tokens(llm.generate("HAMLET:", greedy(8), use_tqdm=False))
    for _ in range(600):
        values = {name: rng.choice(good) for name, good in SAFE.items()} | draw(rng, SamplingParams, SAMPLING_TAKEN)
        values["n"] = 1  # its limit is another matter
        if (params := made(SamplingParams, values)) is not None:
            serve(llm, "HAMLET:", params if params.max_tokens in (1, 2) else params.clone(max_tokens=2, min_tokens=0))
            num_made += 1
    assert num_made > 60
    assert tokens(llm.generate("HAMLET:", greedy(8), use_tqdm=False)) == before


@pytest.mark.slow
def test_random_schemas_are_served_or_refused(llm: LLM) -> None:
    rng = random.Random(2)
    for _ in range(60):
        if (structured := made(StructuredOutputsParams, {"json": random_schema_bomb(rng)})) is not None:
            serve(llm, "HAMLET:", SamplingParams(max_tokens=2, structured_outputs=structured))


@pytest.mark.slow
def test_strange_prompts_and_arguments(llm: LLM) -> None:
    for make in strange_values():
        serve(llm, make(), greedy(1))
        serve(llm, [make()], greedy(1))
        serve(llm, {"prompt_token_ids": make()}, greedy(1))
        serve(llm, {"input_ids": make(), "attention_mask": make()}, greedy(1))
        serve(llm, "A", make())
        serve(llm, "A", [make()])
        serve(llm, "A", greedy(1), priority=make())
        serve(llm, "A", greedy(1), priority=[make()])
