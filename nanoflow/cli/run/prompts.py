"""The prompts of a run, each with its sampling parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nanoflow.cli import prompts_file
from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.core.config.errors import ConfigError


def read(config: RunConfig) -> list[GivenPrompt]:
    """The prompts of `config`, or of its `prompts_file`, and how to sample each.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    return list(each(config))


def count(config: RunConfig) -> int | None:
    """How many prompts there are, all of them readable; None if they come from a stream, which can be read once only.

    Raises:
        ConfigError: as `read` does.
    """
    if config.prompts_file is not None and not Path(config.prompts_file).expanduser().is_file():
        return None
    return sum(1 for _ in each(config))


def each(config: RunConfig) -> Iterator[GivenPrompt]:
    """`read`, one by one: a file is read as far as it is asked for."""
    if config.prompts_file is not None:
        yield from prompts_file.each(config.prompts_file, config.sampling)
    elif not config.prompts:
        raise ConfigError("prompts is empty; give some, such as 'prompts=[\"HAMLET:\"]', or a prompts_file.")
    for text in config.prompts if config.prompts_file is None else ():
        yield GivenPrompt({"prompt": text}, config.sampling)
