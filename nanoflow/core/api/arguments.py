"""Arguments that are one for all prompts, or a list with one for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.config.fields import plain
from nanoflow.core.config.sampling_params import SamplingParams


def params_for(params: SamplingParams | list[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple) or not all(isinstance(item, SamplingParams) for item in params):
        raise RequestError(f"sampling_params must be a SamplingParams or a list of them, got {shown(params):.60}.")
    if len(params) != count:
        raise RequestError(
            f"There are {count} prompts but {len(params)} sampling_params; give one, or one for each prompt."
        )
    return list(params)


def with_priorities(params: list[SamplingParams], priority: int | list[int]) -> list[SamplingParams]:
    priority = plain(priority)
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
