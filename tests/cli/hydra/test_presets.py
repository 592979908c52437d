"""Settings of one's own in files: presets of roles, experiments, and primary configs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Cli

DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def compose(cli: Cli, *arguments: str) -> dict:
    outcome = cli("run", "--cfg", "job", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    return yaml.safe_load(outcome.out)


@pytest.mark.parametrize(
    "where",
    [
        ("--config-dir", "mine"),
        ("-cd", "./mine"),
        ("hydra.searchpath=[file://mine]",),
        ("hydra.searchpath=[mine]",),
        ("hydra.searchpath=[pkg://mine]",),
        ("--config-dir=other", "--config-name=own"),
    ],
)
def test_a_preset_in_a_folder_of_ones_own(cli: Cli, where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path())
    write({
        "mine/__init__.py": "",
        "mine/scheduler/__init__.py": "",
        "mine/scheduler/tiny.yaml": "name: fcfs\nmax_num_seqs: 2\n",
        "mine/scheduler/fcfs.yaml": "max_num_seqs: 7\n",
        "other/own.yaml": "defaults: [config, _self_]\nhydra: {searchpath: [mine]}\n",
    })  # fmt: skip
    scheduler = compose(cli, *where, "scheduler=tiny", "scheduler.max_num_batched_tokens=64")["scheduler"]
    assert (scheduler["name"], scheduler["max_num_seqs"], scheduler["max_num_batched_tokens"]) == ("fcfs", 2, 64)
    assert compose(cli, *where)["scheduler"]["max_num_seqs"] == 7
    assert compose(cli, *where, "scheduler=lpm")["scheduler"]["name"] == "lpm"
    assert "There is no scheduler called 'tony'; installed are: fcfs" in cli("run", *where, "scheduler=tony").error


def test_a_preset_that_builds_on_another_one(cli: Cli) -> None:
    write({
        "mine/scheduler/tiny.yaml": "name: fcfs\nmax_num_seqs: 2\n",
        "mine/scheduler/tinier.yaml": "defaults: [tiny, _self_]\nmax_num_seqs: 1\n",
    })  # fmt: skip
    assert compose(cli, "--config-dir=mine", "scheduler=tinier")["scheduler"]["max_num_seqs"] == 1


def test_a_sweep_over_presets(cli: Cli) -> None:
    write({"mine/scheduler/tiny.yaml": "name: fcfs\nmax_num_seqs: 2\n"})
    short = ("prompts=[a,b,c]", "sampling.max_tokens=2")
    outcome = cli("run", "--config-dir=mine", "-m", "scheduler=tiny,fcfs,nope", *short)
    assert outcome.code == 1
    assert outcome.out.count("| ok") == 2
    assert "There is no scheduler called 'nope'" in outcome.err


def test_a_file_that_is_no_yaml(cli: Cli) -> None:
    write({"mine/scheduler/tiny.yaml": "name: [", "mine/own.yaml": "a: ["})
    assert "is not a YAML file" in cli("run", "--config-dir=mine", "scheduler=tiny").error
    assert "is not a YAML file" in cli("run", "--config-dir=mine", "--config-name=own").error


def test_sweeper_params_on_the_command_line(cli: Cli) -> None:
    assert "sweep with -m KEY=VALUE,VALUE" in cli("run", "-m", "hydra.sweeper.params={sampling.top_k: '1,5'}").error


def test_the_documented_files_and_commands_work(cli: Cli) -> None:
    """Every file of docs/configuration.md is written, and every command composes with it."""
    text = DOCS.read_text(encoding="utf-8")
    files = dict(re.findall(r"```yaml\n# (conf/\S+)\n(.*?)```", text, re.DOTALL))
    commands = re.findall(r"^nanoflow (run .*?)(?:   +#.*)?$", text, re.MULTILINE)
    assert len(files) >= 3
    assert len(commands) >= 4
    write(files)
    for command in commands:
        arguments = [argument for argument in command.split()[1:] if argument != "-m" and "," not in argument]
        compose(cli, *arguments)
