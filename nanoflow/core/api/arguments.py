"""Arguments that are one for all prompts, or a list with one for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams


def listed(prompts: Any, name: str) -> list[Any] | tuple[Any, ...]:
    """One prompt, or several, as several."""
    prompts = [prompts] if _is_single(prompts) else prompts
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"{name} must be a text, token ids, or a list of these, got {type(prompts).__name__}.")
    return prompts


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, list | tuple):
        return len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
    return isinstance(prompts, str | dict)


def params_for(params: SamplingParams | list[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple) or not all(isinstance(item, SamplingParams) for item in params):
        raise RequestError(f"sampling_params must be a SamplingParams or a list of them, got {params!r:.60}.")
    if len(params) != count:
        raise RequestError(
            f"There are {count} prompts but {len(params)} sampling_params; give one, or one for each prompt."
        )
    return list(params)


def with_priorities(params: list[SamplingParams], priority: int | list[int]) -> list[SamplingParams]:
    priorities = priority if isinstance(priority, list | tuple) else [priority] * len(params)
    if len(priorities) != len(params):
        raise RequestError(f"There are {len(params)} prompts but {len(priorities)} priorities; give one for each.")
    return [replace(item, priority=number) for item, number in zip(params, priorities, strict=True)]


@contextmanager
def naming_prompt(index: int, count: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"Prompt {index}: {error}" if count > 1 else str(error)) from None
