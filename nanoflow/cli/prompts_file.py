"""Prompts from a file or standard input, each with its sampling parameters."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanoflow.cli.prompt_line import GivenPrompt, from_json, plain
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams

STDIN = "-"


def read(name: str, sampling: SamplingParams) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """The prompts in a file, and how to sample each: by `sampling`, but for what the file says.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    given = list(each(name, sampling))
    return [item.prompt for item in given], [item.params for item in given]


def refuse_same(output: Path | None, prompts_file: str | None) -> None:
    """Raise if prompts are read from the file that results would be written to.

    Raises:
        ConfigError: that it is so.
    """
    if output is None or prompts_file is None or not output.exists():
        return
    try:
        source = os.fstat(0) if prompts_file == STDIN else Path(prompts_file).expanduser().stat()
    except (OSError, ValueError):  # reading it will say so
        return
    if os.path.samestat(source, output.stat()):
        raise ConfigError(f"output {output} is the prompts_file; choose another file for the completions.")


def each(name: str, sampling: SamplingParams) -> Iterator[GivenPrompt]:
    """`read`, one by one; `-` is standard input."""
    path = Path(name).expanduser()
    parse = from_json if path.suffix == ".jsonl" else plain
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
        if start == 0 and line.startswith(codecs.BOM_UTF8):  # a mark of some editors, and no part of a prompt
            line, start = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8" if start else "utf-8-sig").rstrip("\r\n")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            place = start + error.start
            raise ConfigError(f"prompts_file {path} is not UTF-8 text: {error.reason} at byte {place}.") from error
        start += len(line)
