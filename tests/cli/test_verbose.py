"""`--verbose`: what is logged, and that nothing is without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from nanoflow.cli.verbose import telling
from tests.cli.conftest import Cli

SLOW = "observers=[{name: log, slow_step: 0.000001}]"
SHORT = ("prompts=Hello", "sampling.max_tokens=2")


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """Left as it was."""
    logger = logging.getLogger("nanoflow")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:], level = handlers, logger.setLevel(level)


def test_it_tells_of_plugins_and_of_slow_steps(cli: Cli) -> None:
    outcome = cli("run", "--verbose", SLOW, *SHORT)
    assert outcome.code == 0
    assert "INFO plugins of nanoflow " in outcome.err
    assert "scheduler=fcfs" in outcome.err
    assert "WARNING a step of 1 sequences" in outcome.err


def test_it_is_quiet_without(cli: Cli) -> None:
    assert cli("run", *SHORT).err == ""


@pytest.mark.parametrize(
    ("argv", "added"),
    [
        (["run", "--verbose"], True),
        (["chat", "--verbose", "system=x"], True),
        (["--verbose", "bench", "latency"], True),
        (["bench", "--verbose"], False),
        (["run", "--verbose", "observers=[]"], False),
        (["plugins", "--verbose"], False),
        (["--verbose"], False),
    ],
)
def test_the_observer_log_is_added_where_there_is_an_engine(argv: list[str], added: bool) -> None:
    rest = [argument for argument in argv if argument != "--verbose"]
    assert telling(argv) == rest + ["observers=[log]"] * added
