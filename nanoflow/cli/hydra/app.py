"""Runs a command: lets Hydra compose its settings, for a plain run or for each job of a sweep."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from yaml import YAMLError

from nanoflow.cli import show
from nanoflow.cli.hydra import command_line, config_source, help, sweep
from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.hydra.config_files import ConfigFiles
from nanoflow.cli.hydra.config_source import settings
from nanoflow.cli.hydra.sentences import sentence
from nanoflow.core.config.errors import ConfigError, NanoflowError
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.registry import Registry

logger = logging.getLogger("nanoflow")
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra prints errors and exits, unless this variable makes it raise them


def main(command: HydraCommand, argv: list[str]) -> int:
    """Run `command` with its arguments and return the exit code.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    registry = Registry.load()
    for problem in [*registry.problems, *ConfigFiles(registry).problems]:
        show.warn(problem)
    _log_plugins(registry)
    if "--help" in argv or "-h" in argv:
        print(help.text(command, registry))
        return 0
    composed: list[tuple[DictConfig, Any]] = []  # of a plain run, which goes on below: Hydra would wrap its errors
    succeeded = True

    def task(config: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # maybe in another process
            sweep.run(command, registry, config)
        else:
            composed.append((config, HydraConfig.instance().cfg))

    HydraConfig.instance().cfg = None
    try:
        code = _compose(command, argv, task, registry)
    finally:
        if (folder := sweep.folder()) is not None:
            succeeded = sweep.finish(folder)
    for config, HydraConfig.instance().cfg in composed:
        command.once(settings(command.schema, config, registry), registry)
    return code or int(not succeeded)


def _compose(command: HydraCommand, argv: list[str], task: Callable[[DictConfig], Any], registry: Registry) -> int:
    """Let Hydra do what `argv` says: compose and hand the config to `task`, once or for every job of a sweep.

    `task` must not raise for what a user can cause: Hydra would print a line of its own.

    Returns:
        The exit code that Hydra wants.

    Raises:
        UsageError: a flag or an override that can't be read.
        ConfigError: a config that can't be composed.
    """
    flags, overrides = command_line.split(command.name, argv)
    sweeping = any(flag in ("-m", "--multirun") for flag in flags)
    command_line.check(overrides, sweeping=sweeping, prompts="prompts" in field_names(command.schema))
    config_source.register()
    with _process_state([f"nanoflow {command.name}", *flags, *overrides]):
        try:
            hydra.main(config_path=None, config_name=command.primary, version_base="1.3")(task)()
        except (NanoflowError, BrokenPipeError):
            raise
        except YAMLError as error:
            raise ConfigError(f"A config is not a YAML file: {' '.join(str(error).split())}.") from error
        except (HydraException, ValueError, OSError) as error:
            raise ConfigError(sentence(error, command, registry)) from error
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def _log_plugins(registry: Registry) -> None:
    by_package: dict[str, list[str]] = {}
    for role in registry.roles:
        for entry in registry.entries(role):
            by_package.setdefault(f"{entry.package} {entry.version}", []).append(f"{role}={entry.component.name}")
    for package, names in by_package.items():
        logger.info("plugins of %s: %s", package, ", ".join(names))


@contextmanager
def _process_state(argv: list[str]) -> Iterator[None]:
    """Hydra's settings that are the process's own: its arguments, and an environment variable."""
    old_argv, old_value = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv, os.environ[FULL_ERROR] = argv, "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_value is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = old_value
