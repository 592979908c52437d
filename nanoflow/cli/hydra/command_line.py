"""A command line with Hydra's flags and overrides: told apart and checked before Hydra reads it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nanoflow.cli.errors import UsageError
from nanoflow.cli.hydra.quoting import unescaped
from nanoflow.core.config.errors import ConfigError


def split(command: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides as Hydra reads them, however the two are mixed."""
    overrides = _Parser(command).parse_intermixed_args(argv).overrides
    waiting = list(overrides)
    flags = [argument for argument in argv if not (argument in waiting and waiting.remove(argument) is None)]
    return flags, [unescaped(override) for override in overrides]


_PROMPT_HINT = " A prompt is written 'prompts=\"To be, or not\"'."


def flags(argv: list[str]) -> Namespace:
    """The values of Hydra's flags, and the overrides, in arguments that `split` has gone through."""
    return _Parser("").parse_intermixed_args(argv)


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


def check(overrides: list[str], *, sweeping: bool, prompts: bool = False) -> None:
    """Raise for the first override that can't be read, that only a sweep could use, or that takes a model for a plugin.

    Args:
        overrides: as Hydra reads them.
        sweeping: several values make jobs.
        prompts: the command has the key `prompts`, which somebody may have left out.

    Raises:
        UsageError: one can't be used so.
        ConfigError: `model=` is the name of a checkpoint.
    """
    for text in overrides:
        override = parsed(text)
        if override is None:
            raise UsageError(
                f"The override {text!r} can't be read; write KEY=VALUE, and quote a value with special characters "
                f"twice: 'KEY=\"a: [b\"'.{_PROMPT_HINT if prompts else ''}"
            )
        if not override.get_key_element().strip("+~"):
            raise UsageError(f"The override {text!r} names no key; write KEY=VALUE.")
        if override.is_sweep_override() and not sweeping:
            raise UsageError(
                f"{text!r} gives several values; add -m to run a job with each, or write "
                f"{override.get_key_element()}=[...] for a list."
            )
        if override.key_or_group == "hydra.sweeper.params":
            raise ConfigError("hydra.sweeper.params belongs into a yaml file; here, sweep with -m KEY=VALUE,VALUE.")
        if override.key_or_group == "model" and "/" in (name := str(override.value())):
            raise ConfigError(f"model= takes the name of a plugin, not of a checkpoint; write checkpoint={name}.")


def told() -> set[str]:
    """The keys that the overrides of the command that Hydra runs set, in a sweep those of the job."""
    if not HydraConfig.initialized():
        return set()
    return {text.partition("=")[0].lstrip("+~") for text in HydraConfig.get().overrides.task}


def parsed(override: str) -> Override | None:
    """A `KEY=VALUE` in Hydra's grammar; None if it can't be read."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None
