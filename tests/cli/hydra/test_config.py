"""The shipped configs and the help: composed, compared with the dataclasses, and built."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from nanoflow.cli.hydra.config_source import NanoflowSource
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.cli.settings.schema import all_keys, sections
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import ROLES, in_config
from tests.cli.conftest import Cli

CONF = Path(__file__).parents[3] / "conf"
SECTIONS = sections(RunConfig)
ONE = in_config(ROLES, "one")
OPTIONS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/*.yaml"))


def compose(cli: Cli, *overrides: str) -> dict:
    outcome = cli("run", "--cfg", "job", *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    return yaml.safe_load(outcome.out)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_shipped_option_names_itself_and_shows_the_defaults_of_its_plugin(cli: Cli, option: str) -> None:
    role, name = option.split("/")
    composed = compose(cli, f"{role}={name}")[role]
    defaults = {} if name == AUTO else asdict(Registry.load().get(role, name).component.config())
    assert composed == {"name": name, **defaults}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_shipped_option_can_be_built_or_says_why_not(cli: Cli, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # by which Triton's kernels would run
    outcome = cli("run", option.replace("/", "="), "prompts=[HAMLET]", "sampling.max_tokens=2", "engine.device=cpu")
    role, name = option.split("/")
    if option in ("attention/flash", "attention/hybrid", "attention/triton"):
        assert outcome.code == 1
        assert outcome.err.startswith(f"nanoflow: error: {role}={name} can't be used here: ")
        return
    if role == "model" and name not in (AUTO, "qwen3"):
        assert outcome.code == 1
        assert outcome.err.startswith(f"nanoflow: error: {role}={name} serves ")
        assert "but the checkpoint is of Qwen3ForCausalLM" in outcome.err
        return
    assert (outcome.code, outcome.err) == (0, "")
    assert name == AUTO or f"{role}={name}" in outcome.out


def test_every_built_in_plugin_has_a_file() -> None:
    plugins = {f"{role}/{entry.component.name}" for role in ONE for entry in Registry.load().entries(role)}
    assert plugins == {option for option in OPTIONS if not option.endswith("/auto")}


def test_the_primary_config_says_only_what_differs(cli: Cli) -> None:
    said = yaml.safe_load((CONF / "config.yaml").read_text())
    defaults, composed = asdict(RunConfig()), compose(cli)
    for section in SECTIONS:
        assert composed[section] == defaults[section] | said.get(section, {})
        for key, value in said.get(section, {}).items():
            assert value != defaults[section][key], f"{section}.{key} repeats its default"
    assert composed["prompts"] == said["prompts"]
    assert composed["checkpoint"] == defaults["checkpoint"]


def test_the_default_choice_of_every_role_is_that_of_the_dataclass(cli: Cli) -> None:
    composed = compose(cli)
    assert {role: composed[role]["name"] for role in ONE} == {role: ROLES[role].default for role in ONE}


def test_options_can_be_set_without_a_plus(cli: Cli) -> None:
    composed = compose(cli, "scheduler.max_num_seqs=4", "sampling.seed=7", "sampling.stop=[a,b]", "engine.overlap=true")
    assert composed["scheduler"]["max_num_seqs"] == 4
    assert composed["sampling"]["seed"] == 7
    assert composed["sampling"]["stop"] == ["a", "b"]
    assert composed["engine"]["overlap"] is True


def test_flags_and_overrides_may_be_mixed(cli: Cli) -> None:
    outcome = cli("run", "engine.seed=3", "--cfg", "job", "-p", "engine", "engine.block_size=8")
    composed = yaml.safe_load(outcome.out)
    assert (composed["seed"], composed["block_size"]) == (3, 8)


def test_a_primary_config_of_ones_own(cli: Cli) -> None:
    Path("mine.yaml").write_text("defaults: [config, _self_]\nscheduler: {max_num_seqs: 3}\n")
    composed = compose(cli, "--config-dir=.", "--config-name=mine", "engine.seed=5")
    assert composed["scheduler"]["max_num_seqs"] == 3
    assert composed["engine"]["seed"] == 5


@pytest.mark.slow
def test_info_lists_the_search_path() -> None:  # in its own process: Hydra leaves logging at debug level
    command = [sys.executable, "-m", "nanoflow", "run", "--info", "searchpath"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "nanoflow://" in process.stdout


def test_hydra_leaves_the_process_as_it_was(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = list(sys.argv)
    compose(cli)
    assert sys.argv == before
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


def test_help_has_every_key_with_its_default_and_meaning(cli: Cli) -> None:
    out = cli("run", "--help").out
    for key in all_keys(Registry.load(), RunConfig):
        if key not in (*SECTIONS, *ROLES):
            assert f"\n  {key}=" in out, key
    for schema in (RunConfig, *SECTIONS.values()):
        for item in fields(schema):
            assert item.metadata.get("help", "") in out
    assert "sampling.max_tokens=64 " in out  # what conf/ says, not the dataclass's 16
    assert "engine.block_size=16 " in out
    assert "sampling.ignore_eos=false " in out
    assert "engine.overlap=null " in out
    assert "scheduler.max_num_seqs=256 " in out


def test_every_option_explains_itself() -> None:
    configs = [entry.component.config for role in ROLES for entry in Registry.load().entries(role)]
    for schema in (*SECTIONS.values(), *configs):
        for item in fields(schema):
            assert item.metadata.get("help"), f"{schema.__name__}.{item.name} has no help line"


def test_help_lists_groups_and_their_options(cli: Cli) -> None:
    out = cli("run", "--help").out
    source = NanoflowSource()
    for role in ONE:
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {role} "))
        assert all(name in line for name in source.list(role, None))
        assert line.count("(default)") == 1
