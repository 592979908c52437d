"""The command `nanoflow chat`."""

from __future__ import annotations

from pathlib import Path

from nanoflow.bench.report import Report
from nanoflow.cli import show
from nanoflow.cli.errors import UsageError
from nanoflow.cli.hydra import app
from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.settings.commands import ChatConfig
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow chat [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

A conversation in the terminal. /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves. A message of several
lines stands between \"\"\", or has a backslash at the end of each line but the last.

  nanoflow chat checkpoint=Qwen/Qwen3-0.6B sampling.temperature=0.6 'system="You are terse."'
"""
ONE_ONLY = "`nanoflow chat` is for one conversation; leave out -m."


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "-m" in argv or "--multirun" in argv:
        raise UsageError(ONE_ONLY)
    return app.main(HydraCommand("chat", "chat", INTRO, _converse, _no_job), argv)


def _converse(config: ChatConfig, registry: Registry) -> None:
    from nanoflow.cli.chat.conversation import Conversation
    from nanoflow.core.api.llm import LLM

    with LLM.from_config(config.build, registry) as llm:
        conversation = Conversation(llm, config.sampling, config.system)
        show.engine(llm.describe())
        conversation.run()


def _no_job(config: ChatConfig, registry: Registry, folder: Path) -> Report:
    raise UsageError(ONE_ONLY)
