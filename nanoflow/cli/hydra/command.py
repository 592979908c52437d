"""What a command with settings that Hydra composes consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.bench.report import Report
from nanoflow.cli.settings.commands import PRIMARIES
from nanoflow.cli.settings.schema import Settings
from nanoflow.core.registry.registry import Registry


@dataclass(frozen=True)
class HydraCommand:
    """One command. It can be pickled, so that a job of a sweep may run in another process.

    Attributes:
        name: as on the command line.
        primary: the primary config; one of `settings.commands.PRIMARIES`.
        intro: the first lines of its help.
        once: does what the settings say, and prints it.
        job: the same for a job of a sweep, quietly; files go under the folder.
    """

    name: str
    primary: str
    intro: str
    once: Callable[[Any, Registry], None]
    job: Callable[[Any, Registry, Path], Report]

    @property
    def file(self) -> str:
        """The name of the yaml file of the primary config."""
        return PRIMARIES[self.primary][0]

    @property
    def schema(self) -> type[Settings]:
        """The dataclass of all settings."""
        return PRIMARIES[self.primary][1]
