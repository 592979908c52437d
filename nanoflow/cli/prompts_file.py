"""Prompts from a file or standard input, each with its sampling parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from nanoflow.cli.settings.checks import checked
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids")
STDIN = "-"

PromptAndParams: TypeAlias = "tuple[dict[str, Any], SamplingParams]"


def read(name: str, sampling: SamplingParams) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """The prompts in a file, and how to sample each: by `sampling`, but for what the file says.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    pairs = list(each(name, sampling))
    return [prompt for prompt, _ in pairs], [params for _, params in pairs]


def each(name: str, sampling: SamplingParams) -> Iterator[PromptAndParams]:
    """`read`, one by one; `-` is standard input."""
    path = Path(name).expanduser()
    parse = _json_prompt if path.suffix == ".jsonl" else _plain_prompt
    empty = True
    for number, line in enumerate(_lines(name, path), start=1):
        if line.strip():
            empty = False
            try:
                yield parse(line, sampling)
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    if empty:
        where = "Standard input" if name == STDIN else f"prompts_file {path}"
        raise ConfigError(f"{where} holds no prompt; write one a line.")


def _lines(name: str, path: Path) -> Iterator[str]:
    """Lines without their ends; a carriage return belongs to the end."""
    try:
        if name == STDIN:
            yield from _decoded(sys.stdin.buffer, path)
        else:
            with path.open("rb") as file:
                yield from _decoded(file, path)
    except OSError as error:
        raise ConfigError(f"prompts_file {path} can't be read: {error.strerror}.") from error


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    start = 0
    for line in file:
        try:
            yield line.decode("utf-8" if start else "utf-8-sig").rstrip("\r\n")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            place = start + error.start
            raise ConfigError(f"prompts_file {path} is not UTF-8 text: {error.reason} at byte {place}.") from error
        start += len(line)


def _plain_prompt(line: str, sampling: SamplingParams) -> PromptAndParams:
    return {"prompt": line}, sampling


def _json_prompt(line: str, sampling: SamplingParams) -> PromptAndParams:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"this is not JSON: {error}.") from error
    if not isinstance(values, dict) or sum(key in values for key in PROMPT_KEYS) != 1:
        raise ConfigError('this must be an object with either "prompt" or "prompt_token_ids".')
    key = next(key for key in PROMPT_KEYS if key in values)
    prompt = {key: values.pop(key)}
    return prompt, checked(SamplingParams, {**asdict(sampling), **values}, "sampling.") if values else sampling
