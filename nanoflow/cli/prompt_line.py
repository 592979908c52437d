"""A line of a prompts file: a text, or a JSON object with a prompt and what belongs to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NamedTuple

from nanoflow.cli import openai_line
from nanoflow.cli.settings.checks import checked, unknown_key
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import field_names
from nanoflow.core.config.sampling_params import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
TEMPLATE_KEYS = ("tools", "chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
RECORD_KEYS = (
    "prompt", "prompt_token_ids", "messages", "text", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens",
    "num_output_tokens", "num_cached_tokens", "ttft", "completions", "index", "cumulative_logprob",
)  # fmt: skip
NESTED = ("sampling", "sampling_params")  # where somebody may look for the sampling parameters
SIMILAR = 0.8  # a key as close to a sampling parameter's name is a misspelt one
MOST_LEVELS = 64  # of objects and lists within each other
NOTHING: Mapping[str, Any] = MappingProxyType({})


class GivenPrompt(NamedTuple):
    """One prompt of a run.

    Attributes:
        prompt: `{"prompt": text}`, `{"prompt_token_ids": ids}` or `{"messages": conversation}`.
        params: how to sample.
        own: keys that nanoflow has no meaning for, such as an id; they go into the record as they are.
        template: of a conversation: keyword arguments for the chat template.
    """

    prompt: dict[str, Any]
    params: SamplingParams
    own: Mapping[str, Any] = NOTHING
    template: Mapping[str, Any] = NOTHING


def plain(line: str, sampling: SamplingParams) -> GivenPrompt:
    """A line of text is a prompt."""
    return GivenPrompt({"prompt": line}, sampling)


def from_json(line: str, sampling: SamplingParams) -> GivenPrompt:
    """An object with a prompt, sampling parameters and keys of one's own beside it; or a line of OpenAI's batch format.

    Raises:
        ConfigError: it is none of these, or a value can't be used.
    """
    values = _read(line)
    if isinstance(values, dict) and openai_line.is_one(values):
        outside, values = openai_line.parts(values)
        given = _prompt(values, sampling)
        if given.own:
            raise ConfigError(f"its body has the key {next(iter(given.own))!r}, which is not served; leave it out.")
        return given._replace(own=outside)
    return _prompt(values, sampling)


def _read(line: str) -> Any:
    try:
        values = json.loads(line)
        _check_depth(values)
    except json.JSONDecodeError as error:
        raise ConfigError(f"this is not JSON: {error}.") from error
    except ValueError:  # Python reads integers of a few thousand digits only
        raise ConfigError("a number in it has too many digits; write it as a text.") from None
    except RecursionError:
        raise ConfigError(f"it is nested too deeply; at most {MOST_LEVELS} levels are read.") from None
    return values


def _check_depth(values: Any) -> None:
    level: list[Any] = [values]
    for _ in range(MOST_LEVELS + 1):
        level = [item for part in level if isinstance(part, dict | list) for item in _items(part)]
    if level:
        raise RecursionError


def _items(part: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part


def _prompt(values: Any, sampling: SamplingParams) -> GivenPrompt:
    if not isinstance(values, dict) or sum(key in values for key in PROMPT_KEYS) != 1:
        raise ConfigError('this must be an object with either "prompt", "prompt_token_ids" or "messages".')
    values = dict(values)
    key = next(key for key in PROMPT_KEYS if key in values)
    prompt = {key: values.pop(key)}
    template = {name: values.pop(name) for name in TEMPLATE_KEYS if name in values} if key == "messages" else {}
    names = field_names(SamplingParams)
    told = {name: values.pop(name) for name in names if name in values}
    _check_own(values, names)
    params = checked(SamplingParams, {**asdict(sampling), **told}, "sampling.") if told else sampling
    return GivenPrompt(prompt, params, values, template)


def _check_own(own: dict[str, Any], names: list[str]) -> None:
    """Refuse keys that would be lost in the record, and those that were meant for something else."""
    for key in own:
        if get_close_matches(key, names, n=1, cutoff=SIMILAR):
            raise ConfigError(unknown_key(f"sampling.{key}", [f"sampling.{name}" for name in names]))
        if key in NESTED:
            raise ConfigError(f'sampling parameters stand beside the prompt, such as "top_k": 5, and not in {key!r}.')
        if key in RECORD_KEYS:
            raise ConfigError(f"the key {key!r} is one of the record that is written for it; choose another name.")
