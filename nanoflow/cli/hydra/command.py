"""What a command with settings that Hydra composes consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanoflow.cli.settings.schema import Settings
from nanoflow.core.registry.registry import Registry


class Report(Protocol):
    """What a job did, as far as a sweep asks."""

    description: dict[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """Those of `numbers` that a sweep's table shows, with their titles."""

    @property
    def headline(self) -> str:
        """The outcome in a few words."""

    def numbers(self) -> dict[str, Any]:
        """What can be compared between jobs, by the names that tables and files use."""


@dataclass(frozen=True)
class HydraCommand:
    """One command. It can be pickled, so that a job of a sweep may run in another process.

    Attributes:
        name: as on the command line.
        primary: the primary config; one of `settings.commands.PRIMARIES`.
        schema: dataclass of all settings.
        intro: the first lines of its help.
        once: does what the settings say, and prints it.
        job: the same for a job of a sweep, quietly; files go under the folder.
    """

    name: str
    primary: str
    schema: type[Settings]
    intro: str
    once: Callable[[Any, Registry], None]
    job: Callable[[Any, Registry, Path], Report]
