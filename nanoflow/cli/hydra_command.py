"""A command whose settings Hydra composes: run once, or for each job of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nanoflow.cli import hydra_app, hydra_help, show, sweep
from nanoflow.cli.config_files import ConfigFiles
from nanoflow.cli.settings import Settings
from nanoflow.core.registry.registry import Registry


class Report(Protocol):
    """What a job did, as far as a sweep asks."""

    made_of: dict[str, str]

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
    """One command, to be kept as `COMMAND` in the module that its name says.

    Attributes:
        name: as on the command line.
        primary: the primary config; one of `config_source.PRIMARIES`.
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

    @property
    def module(self) -> str:
        """The one that holds it, as `COMMAND`."""
        return f"nanoflow.cli.{self.name.replace(' ', '.')}"

    def main(self, argv: list[str]) -> int:
        """Run the command with its arguments and return the exit code."""
        registry = Registry.load()
        for problem in [*registry.problems, *ConfigFiles(registry).problems]:
            show.warn(problem)
        if "--help" in argv or "-h" in argv:
            print(hydra_help.text(self, registry))
            return 0
        composed: list[DictConfig] = []  # of a plain run, which goes on below: Hydra would wrap its errors
        succeeded = True

        def task(config: DictConfig) -> None:
            hydra = HydraConfig.get()
            if hydra.mode == RunMode.MULTIRUN:  # maybe in another process
                overrides = list(hydra.overrides.task)
                sweep.run(self, registry, config, hydra.job.num, overrides, Path(hydra.runtime.output_dir))
            else:
                composed.append(config)

        HydraConfig.instance().cfg = None
        try:
            code = hydra_app.run(self, argv, task, registry)
        finally:
            if (folder := sweep.folder()) is not None:
                succeeded = sweep.finish(folder)
        for config in composed:
            self.once(self.schema.from_composed(config, registry), registry)
        return code or int(not succeeded)
