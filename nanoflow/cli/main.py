"""The entry of the command line. Commands are imported when they are asked for, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper

from nanoflow import __version__
from nanoflow.cli import verbose
from nanoflow.cli.errors import UsageError
from nanoflow.core.config.errors import NanoflowError, did_you_mean

BLOCK = "NANOFLOW_BLOCK"  # the variable that `Registry.load` reads
COMMANDS = {
    "run": "generate text; -m sweeps over settings",
    "chat": "talk with a model in the terminal",
    "bench": "measure throughput and latency against what the hardware allows",
    "results": "show, sort and plot what a sweep found out",
    "plugins": "list the installed plugins, or start one of your own",
}
USAGE = "\n".join(
    [
        "Usage: nanoflow [--version] [--help] COMMAND ...",
        "",
        "Commands:",
        *(f"  {name:<10}{line}" for name, line in COMMANDS.items()),
        "",
        "`nanoflow COMMAND --help` says more. With --debug, an error shows its traceback; with --verbose, plugins,",
        "slow steps and the like are told on standard error; with --block NAME, the plugin or the package of that name",
        "is left alone, as if it were not installed.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C.

    Args:
        argv: the arguments, without the program's name; those of the process if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end a run
    try:
        with _blocking(argv) as argv:
            rest = [argument for argument in argv if argument != "--debug"]
            code = _dispatch(verbose.telling(rest) if verbose.FLAG in rest else rest)
        sys.stdout.flush()
        return code
    except NanoflowError as error:
        if debug:
            raise
        print(f"nanoflow: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        if debug:
            raise
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextmanager
def _blocking(argv: list[str]) -> Iterator[list[str]]:
    """`argv` without each `--block NAME`; the names are in the environment meanwhile, for processes that it starts."""
    rest, names = [], []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, name = argument.partition("=")
        if flag != "--block":
            rest.append(argument)
            continue
        name = name if equals else next(arguments, "")
        if not name or name.startswith("-"):
            raise UsageError("--block needs the name of a plugin or of its package; `nanoflow plugins` lists them.")
        names.append(name)
    before = os.environ.get(BLOCK)
    if names:
        os.environ[BLOCK] = ",".join([*filter(None, [before]), *names])
    try:
        yield rest
    finally:
        if names and before is None:
            del os.environ[BLOCK]
        elif names:
            os.environ[BLOCK] = before


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    command, *arguments = argv
    if command == "--version":
        print(f"nanoflow {__version__}")
        return 0
    if command not in COMMANDS:
        raise UsageError(
            f"There is no command {command!r}; there are: {', '.join(COMMANDS)}.{did_you_mean(command, COMMANDS)}"
        )
    return import_module(f"nanoflow.cli.{command}.command").main(arguments)
