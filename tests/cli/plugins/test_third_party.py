"""A third party's package: found, selectable, overridable, listed; and harmless when it is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from tests.cli.conftest import Cli

LOTTERY = """
    from dataclasses import dataclass

    from nanoflow import Component, hookimpl
    from nanoflow.core.config import SchedulerConfig, option
    from nanoflow.plugins.schedulers.fcfs import FCFSScheduler


    @dataclass(frozen=True)
    class LotteryConfig(SchedulerConfig):
        patience: float = option(1.5, "how long the longest job waits")


    @hookimpl
    def nanoflow_schedulers():
        return [Component("lottery", build=FCFSScheduler, config=LotteryConfig)]


    @hookimpl
    def nanoflow_config_packages():
        return ["theirs.conf"]
"""
WITH_YAML = {"__init__.py": LOTTERY, "conf/scheduler/lottery.yaml": "name: lottery\n"}
WITHOUT_YAML = {"__init__.py": LOTTERY.replace('["theirs.conf"]', "[]")}
PRESET = {**WITH_YAML, "conf/scheduler/hasty.yaml": "name: lottery\npatience: 0.1\n"}
SHORT = ("prompts=[HAMLET]", "sampling.max_tokens=2")


@pytest.mark.parametrize("sources", [WITH_YAML, WITHOUT_YAML], ids=["yaml with a name only", "no yaml"])
def test_all_keys_are_there(cli: Cli, install: Callable, sources: dict[str, str]) -> None:
    install("theirs", sources)
    outcome = cli("run", "--cfg", "job", "scheduler=lottery", "scheduler.max_num_seqs=4", "-p", "scheduler")
    assert yaml.safe_load(outcome.out) == {
        "name": "lottery",
        "max_num_seqs": 4,
        "max_num_batched_tokens": None,
        "patience": 1.5,
    }


def test_it_runs(cli: Cli, install: Callable) -> None:
    install("theirs", WITH_YAML)
    outcome = cli("run", "scheduler=lottery", "scheduler.patience=2", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    assert "scheduler=lottery" in outcome.out


def test_a_preset_of_a_plugin(cli: Cli, install: Callable) -> None:
    install("theirs", PRESET)
    composed = yaml.safe_load(cli("run", "--cfg", "job", "scheduler=hasty", "-p", "scheduler").out)
    assert composed["name"] == "lottery"
    assert composed["patience"] == 0.1
    assert composed["max_num_seqs"] == 256


@pytest.mark.slow
def test_its_options_are_checked_like_ours(cli: Cli, install: Callable) -> None:
    install("theirs", WITH_YAML)
    assert "Did you mean 'patience'?" in cli("run", "scheduler=lottery", "+scheduler.patiance=2").error
    assert (
        "scheduler.patience must be a number, got 'much'."
        in cli("run", "scheduler=lottery", "scheduler.patience=much").error
    )
    assert "Did you mean 'scheduler.patience'?" in cli("run", "patience=2").error


def test_help_and_plugins_know_it(cli: Cli, install: Callable) -> None:
    install("theirs", PRESET, version="4.5")
    out = cli("run", "--help").out
    assert "fcfs (default), hasty, lottery, lpm, priority, sjf" in out
    assert "scheduler.patience=1.5 " in out
    assert "how long the longest job waits" in out
    (line,) = (line for line in cli("plugins").out.splitlines() if "lottery" in line)
    assert [cell.strip() for cell in line.split("|")] == ["scheduler", "lottery", "theirs", "4.5", "yes"]


def test_a_backend_that_cannot_be_used_here_says_why(cli: Cli, install: Callable) -> None:
    install(
        "theirs",
        {
            "__init__.py": """
                from nanoflow import Component, hookimpl

                @hookimpl
                def nanoflow_attention_backends():
                    reason = "the package warp is not installed: pip install warp"
                    return [Component("warp", build=None, available=lambda: reason, priority=9)]
            """
        },
    )
    outcome = cli("run", "attention=warp", *SHORT)
    assert outcome.code == 1
    assert "attention=warp can't be used here: the package warp is not installed: pip install warp" in outcome.error
    assert cli("run", *SHORT).code == 0  # auto passes it over
    assert "no: the package warp is not installed" in cli("plugins").out


NO_SUCH_HOOK = """
    from nanoflow import hookimpl

    @hookimpl
    def nanoflow_schedulars():
        return []
"""
NO_SUCH_FOLDER = """
    from nanoflow import hookimpl

    @hookimpl
    def nanoflow_config_packages():
        return ["broken.conf"]
"""
NO_DEFAULT = """
    from dataclasses import dataclass

    from nanoflow import Component, hookimpl

    @dataclass(frozen=True)
    class Config:
        size: int

    @hookimpl
    def nanoflow_block_managers():
        return [Component("greedy", build=None, config=Config)]
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        (NO_SUCH_HOOK, "nanoflow_schedulars"),
        (NO_SUCH_FOLDER, "there is no package 'broken.conf'"),
        (NO_DEFAULT, "'size'"),
    ],
    ids=["an import that fails", "a misspelt hook", "a folder that is not there", "an option without a default"],
)
def test_a_broken_plugin_is_a_warning(cli: Cli, install: Callable, source: str, reason: str) -> None:
    install("broken", {"__init__.py": source})
    for argv in (("run", *SHORT), ("run", "--cfg", "job"), ("plugins",)):
        outcome = cli(*argv)
        assert outcome.code == 0
        assert outcome.err.count("nanoflow: warning: Plugin 'broken' of broken 1.2 was left out") == 1
        assert reason in outcome.err
        assert "Traceback" not in outcome.err


def test_two_plugins_of_one_name_are_an_error_that_names_both(cli: Cli, install: Callable) -> None:
    install("theirs", WITHOUT_YAML)
    install("others", WITHOUT_YAML, version="0.9")
    outcome = cli("run")
    assert outcome.code == 1
    assert "scheduler=lottery" in outcome.error
    assert "theirs 1.2" in outcome.error
    assert "others 0.9" in outcome.error


def test_types_that_omegaconf_cannot_express_are_left_to_the_dataclass(cli: Cli, install: Callable) -> None:
    literal = LOTTERY.replace("patience: float = option(1.5,", 'patience: Literal["much", "little"] = option("much",')
    install("theirs", {**WITH_YAML, "__init__.py": "from typing import Literal\n" + literal.replace("\n    ", "\n")})
    outcome = cli("run", "--cfg", "job", "scheduler=lottery", "scheduler.patience=little", "-p", "scheduler")
    assert yaml.safe_load(outcome.out)["patience"] == "little"
    assert cli("run", "scheduler=lottery", "scheduler.patience=little", *SHORT).code == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("name: [", "is not a YAML file"), ("nmae: lottery\n", "'nmae'"), ("- lottery\n", "lottery.yaml")],
    ids=["not yaml", "a typo", "a list"],
)
def test_a_bad_yaml_file_of_theirs(cli: Cli, install: Callable, text: str, expected: str) -> None:
    install("theirs", {**WITH_YAML, "conf/scheduler/lottery.yaml": text})
    assert cli("run", *SHORT).code == 0  # harms nobody who doesn't choose it
    outcome = cli("run", "scheduler=lottery")
    assert outcome.code == 1
    assert expected in outcome.error
