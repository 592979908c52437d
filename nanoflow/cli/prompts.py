"""The prompts of a run, each with its sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoflow.cli.settings import RunConfig, checked
from nanoflow.core.config import SamplingParams
from nanoflow.core.errors import ConfigError

PROMPT_KEYS = ("prompt", "prompt_token_ids")


def read(config: RunConfig) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """The prompts of `config`, or of its `prompts_file`, and how to sample each.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    if config.prompts_file is not None:
        return read_file(config.prompts_file, config.sampling)
    if not config.prompts:
        raise ConfigError("prompts is empty; give some, such as 'prompts=[\"HAMLET:\"]', or a prompts_file.")
    return [{"prompt": text} for text in config.prompts], [config.sampling] * len(config.prompts)


def read_file(name: str, sampling: SamplingParams) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """The prompts in a file, and how to sample each: by `sampling`, but for what the file says.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    path = Path(name).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts_file {path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise ConfigError(f"prompts_file {path} can't be read: {error.strerror}.") from error
    parse = _json_lines if path.suffix == ".jsonl" else _plain_lines
    pairs = list(parse(lines, sampling, path))
    if not pairs:
        raise ConfigError(f"prompts_file {path} holds no prompt; write one a line.")
    return [prompt for prompt, _ in pairs], [params for _, params in pairs]


def _plain_lines(lines: list[str], sampling: SamplingParams, path: Path) -> Iterator[tuple[dict, SamplingParams]]:
    return (({"prompt": line}, sampling) for line in lines if line.strip())


def _json_lines(lines: list[str], sampling: SamplingParams, path: Path) -> Iterator[tuple[dict, SamplingParams]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _json_prompt(line, sampling)
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error


def _json_prompt(line: str, sampling: SamplingParams) -> tuple[dict, SamplingParams]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"this is not JSON: {error}.") from error
    if not isinstance(values, dict) or sum(key in values for key in PROMPT_KEYS) != 1:
        raise ConfigError('this must be an object with either "prompt" or "prompt_token_ids".')
    key = next(key for key in PROMPT_KEYS if key in values)
    return {key: values.pop(key)}, checked(SamplingParams, {**asdict(sampling), **values}, "sampling.")
