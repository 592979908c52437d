"""`nanoflow chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path

from nanoflow.cli import UsageError, show
from nanoflow.cli.chat_settings import ChatConfig
from nanoflow.cli.hydra_command import HydraCommand, Report
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow chat [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

A conversation in the terminal. /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves.

  nanoflow chat checkpoint=Qwen/Qwen3-0.6B sampling.temperature=0.6 'system="You are terse."'
"""


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "-m" in argv or "--multirun" in argv:
        raise UsageError("`nanoflow chat` is for one conversation; leave out -m.")
    return HydraCommand("chat", "chat", ChatConfig, INTRO, _converse, _no_job).main(argv)


def _converse(config: ChatConfig, registry: Registry) -> None:
    from nanoflow.cli.conversation import Conversation
    from nanoflow.core.api.llm import LLM

    with LLM.from_config(config.build, registry) as llm:
        conversation = Conversation(llm, config.sampling, config.system)
        show.engine(llm.describe())
        conversation.run()


def _no_job(config: ChatConfig, registry: Registry, folder: Path) -> Report:
    raise UsageError("`nanoflow chat` is for one conversation; leave out -m.")
