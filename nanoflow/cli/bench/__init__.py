"""`nanoflow bench`: how fast an engine is, and how near to what the device allows."""

from __future__ import annotations

from importlib import import_module

from nanoflow.cli import UsageError
from nanoflow.core.config.errors import did_you_mean

COMMANDS = {
    "throughput": "many requests at once: output tokens a second",
    "latency": "few requests at once: time of a decode step, to the first token, or to start",
    "serving": "requests that arrive over time: percentiles of what each waits",
}
USAGE = "\n".join(
    [
        "Usage: nanoflow bench COMMAND [flags] [GROUP=OPTION ...] [KEY=VALUE ...]",
        "",
        "Commands:",
        *(f"  {name:<12}{line}" for name, line in COMMANDS.items()),
        "",
        "The engine's groups and keys are those of `nanoflow run`, and -m sweeps over them.",
        "`nanoflow bench COMMAND --help` says more.",
    ]
)


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    command, *arguments = argv
    if command not in COMMANDS:
        raise UsageError(
            f"There is no command 'bench {command}'; there are: {', '.join(COMMANDS)}.{did_you_mean(command, COMMANDS)}"
        )
    return import_module(f"nanoflow.cli.bench.{command}").main(arguments)
