"""Runs Hydra, and turns what it complains about into sentences."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    HydraException,
    MissingConfigException,
)
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from nanoflow.cli import UsageError, config_source
from nanoflow.cli.settings import all_keys, unknown_key
from nanoflow.core.config.errors import ConfigError, NanoflowError
from nanoflow.core.registry.registry import Registry

if TYPE_CHECKING:
    from nanoflow.cli.hydra_command import HydraCommand

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra prints errors and exits, unless this variable makes it raise them


def run(command: HydraCommand, argv: list[str], task: Callable[[DictConfig], Any], registry: Registry) -> int:
    """Let Hydra do what `argv` says: compose and hand the config to `task`, once or for every job of a sweep.

    `task` must not raise for what a user can cause: Hydra would print a line of its own.

    Returns:
        The exit code that Hydra wants.

    Raises:
        UsageError: a flag or an override that can't be read.
        ConfigError: a config that can't be composed.
    """
    flags, overrides = split(command.name, argv)
    _check(overrides, sweeping=any(flag in ("-m", "--multirun") for flag in flags))
    config_source.register()
    with _process_state([f"nanoflow {command.name}", *flags, *overrides]):
        try:
            hydra.main(config_path=None, config_name=command.primary, version_base="1.3")(task)()
        except (NanoflowError, BrokenPipeError):
            raise
        except (HydraException, ValueError, OSError) as error:
            raise ConfigError(_sentence(error, command, registry)) from error
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def split(command: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides, however the two are mixed."""
    overrides = _Parser(command).parse_intermixed_args(argv).overrides
    waiting = list(overrides)
    flags = [argument for argument in argv if not (argument in waiting and waiting.remove(argument) is None)]
    return flags, overrides


class _Parser(ArgumentParser):
    """The flags of Hydra that a command takes. Hydra reads them again; here they are told from the overrides."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"nanoflow {command}", add_help=False, allow_abbrev=False)
        for switch in ("--run/-r", "--multirun/-m", "--resolve", "--hydra-help"):
            self.add_argument(*switch.split("/"), action="store_true")
        self.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
        for flag in ("--package/-p", "--config-name/-cn", "--config-dir/-cd"):
            self.add_argument(*flag.split("/"))
        topics = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
        self.add_argument("--info", "-i", nargs="?", const="all", choices=topics)
        self.add_argument("overrides", nargs="*")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the flags.")


def _check(overrides: list[str], *, sweeping: bool) -> None:
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise UsageError(
                f"The override {override!r} can't be read; write KEY=VALUE, and quote a value with special characters "
                "twice: 'KEY=\"a: [b\"'."
            ) from error
        if not parsed.get_key_element().strip("+~"):
            raise UsageError(f"The override {override!r} names no key; write KEY=VALUE.")
        if parsed.is_sweep_override() and not sweeping:
            raise UsageError(
                f"{override!r} gives several values; add -m to run a job with each, or write "
                f"{parsed.get_key_element()}=[...] for a list."
            )


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


def _sentence(error: Exception, command: HydraCommand, registry: Registry) -> str:
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        if cause.full_key.startswith("hydra."):
            return f"There is no key {cause.full_key!r}; `nanoflow {command.name} --cfg hydra` shows those of Hydra."
        return unknown_key(cause.full_key, all_keys(registry, command.schema))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        options = f"; there are: {', '.join(error.options)}" if error.options else ""
        lacks = error.missing_cfg_file.startswith("hydra/launcher/") and "joblib" not in (error.options or ())
        more = " More come with `pip install 'nanoflow[launchers]'`." if lacks else ""
        return f"There is no config {error.missing_cfg_file!r}{options}.{more}"
    causes = ". ".join(str(part) for part in (error, cause) if str(part or ""))
    text = " ".join(causes.split()).partition(" full_key:")[0].rstrip(". ")
    return f"{text or type(error).__name__}."
