"""Everything that a user can get wrong in `run`: one sentence that says what would be right, and no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from nanoflow.cli.hydra.sentences import sentence
from nanoflow.cli.run.command import COMMAND
from nanoflow.cli.settings.commands import RunConfig
from nanoflow.cli.settings.schema import sections
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES, in_config
from tests.cli.conftest import Cli

BUNDLED = Path(__file__).parents[3] / "nanoflow" / "assets" / "bard"
SECTIONS = sections(RunConfig)

SETTINGS = {
    # a typo in a key: at the top, nested, in a group, behind +, in the wrong place
    "prompt=x": "There is no key 'prompt'. Did you mean 'prompts'?",
    "+prompt=x": "There is no key 'prompt'. Did you mean 'prompts'?",
    "++prompt=x": "There is no key 'prompt'. Did you mean 'prompts'?",
    "sampling.temprature=1": "Did you mean 'sampling.temperature'?",
    "+sampling.temprature=1": "Did you mean 'sampling.temperature'?",
    "engine.sede=1": "Did you mean 'engine.seed'?",
    "sampling.structured_outputs={regx: a}": "Did you mean 'sampling.structured_outputs.regex'?",
    "engine.seed.x=1": "engine.seed must be an integer",
    "+engine.x.y=1": "There is no key 'engine.x'; there are: engine.dtype",
    "scheduler.max_num_seq=4": "scheduler=fcfs has no option 'max_num_seq'",
    "+scheduler.max_num_seq=4": "Did you mean 'max_num_seqs'?",
    "block_manager.size=4": "block_manager=prefix has no option 'size'; it has no options",
    "max_tokens=4": "Did you mean 'sampling.max_tokens'?",
    "max_num_seqs=4": "Did you mean 'scheduler.max_num_seqs'?",
    "zzz=1": "There is no key 'zzz'; there are: checkpoint, prompts",
    "~zzz": "'zzz' does not exist",
    "hydra.zzz=1": "There is no key 'hydra.zzz'",
    # a wrong type
    "engine.block_size=abc": "engine.block_size must be an integer, got 'abc'.",
    "engine.block_size=1.5": "engine.block_size must be an integer, got 1.5.",
    "engine.block_size=null": "engine.block_size must be an integer, got None.",
    "engine.overlap=maybe": "engine.overlap must be true or false or null, got 'maybe'.",
    "sampling.temperature=hot": "sampling.temperature must be a number, got 'hot'.",
    "sampling.max_tokens=[1]": "sampling.max_tokens must be an integer or null, got [1].",
    "sampling.stop=END": "sampling.stop must be a list of texts or null, got 'END'; write sampling.stop=[...].",
    "sampling.stop_token_ids=[x]": "sampling.stop_token_ids must be a list of integers or null",
    "sampling.logit_bias=5": "sampling.logit_bias must be a map or null, got 5.",
    "sampling.logit_bias={5:101}": "sampling.logit_bias must be a map from token ids >= 0 to numbers in [-100, 100]",
    "sampling.temperature={5:1}": "sampling.temperature must be a number, got {5: 1}.",
    "scheduler.max_num_seqs=many": "scheduler.max_num_seqs must be an integer, got 'many'.",
    "prompts=5": "prompts must be a list of texts, got 5; write prompts=[...].",
    "engine=4": "engine holds options, such as engine.NAME=VALUE",
    "sampling=null": "sampling holds options",
    "scheduler.name=null": "scheduler.name must be the name of a plugin, got None.",
    "scheduler=null": "Config group override must be a string or a list",
    "engine.seed=${nowhere}": "engine.seed can't be resolved: Interpolation key 'nowhere' not found.",
    # a value out of its range
    "engine.dtype=float64": "engine.dtype must be one of auto, float32, float16, bfloat16, got 'float64'.",
    "engine.kv_cache_gib=-1": "engine.kv_cache_gib must be a number > 0 or null, got -1.0.",
    "sampling.temperature=-1": "sampling.temperature must be a number >= 0, got -1.0.",
    "sampling.temperature=nan": "sampling.temperature must be a number >= 0, got nan.",
    "sampling.top_p=1.5": "sampling.top_p must be a number in (0, 1], got 1.5.",
    "sampling.structured_outputs={choice: []}": "sampling.structured_outputs.choice must be a non-empty list",
    "sampling.structured_outputs={regex: a, json_object: true}": "exactly one of json, regex, choice, grammar",
    "scheduler.max_num_seqs=0": "scheduler.max_num_seqs must be an integer >= 1, got 0.",
    "prompts=[]": "prompts is empty",
    # an unknown option
    "scheduler=fcsf": "There is no scheduler called 'fcsf'; installed are: fcfs, lpm, priority, sjf. Did you mean",
    "hydra/launcher=slurm": "there are: basic, joblib, submitit_local, submitit_slurm.",
    "attention=flsh": "There is no attention called 'flsh'; installed are:",
    "model=qwem3": "Did you mean 'qwen3'?",
    "block_manager=a/b": "There is no config 'block_manager/a/b'; there are: plain, prefix, radix.",
    "hydra/launcher=nope": "There is no config 'hydra/launcher/nope'",
    "nope/nope=1": "There is no key 'nope/nope'",
    # files
    "checkpoint=./nowhere": "nowhere",
    "prompts_file=nowhere.txt": "prompts_file nowhere.txt can't be read: No such file or directory.",
    "prompts_file=.": "prompts_file . can't be read: Is a directory.",
    "output=nowhere/out.jsonl": "output nowhere/out.jsonl can't be written",
    "output=.": "output . can't be written",
    "--config-name=nope": "There is no config 'nope'.",
    "--config-dir=nope": "not found",
}  # fmt: skip

USAGE = {
    "prompts": "The override 'prompts' can't be read; write KEY=VALUE",
    "prompts=[": "can't be read",
    "=1": "names no key",
    "engine.seed=1,2": "add -m to run a job with each, or write engine.seed=[...] for a list",
    "engine.seed=range(1,3)": "add -m to run a job with each",
    "--frobnicate": "unrecognized arguments: --frobnicate",
    "--cfg=everything": "invalid choice: 'everything'",
    "--config-name": "expected one argument",
}


@pytest.mark.parametrize("argument", SETTINGS)
def test_a_setting_that_cannot_be_used(cli: Cli, argument: str) -> None:
    outcome = cli("run", argument)
    assert SETTINGS[argument] in outcome.error
    assert (outcome.code, outcome.out) == (1, "")


def test_a_launcher_that_is_not_installed() -> None:
    error = MissingConfigException("", missing_cfg_file="hydra/launcher/joblib", options=["basic"])
    expected = "There is no config 'hydra/launcher/joblib'; there are: basic. More come with `pip install "
    assert sentence(error, COMMAND, Registry.load()) == f"{expected}'nanoflow-engine[launchers]'`."


@pytest.mark.parametrize("argument", USAGE)
def test_a_command_line_that_cannot_be_read(cli: Cli, argument: str) -> None:
    outcome = cli("run", argument)
    assert USAGE[argument] in outcome.error
    assert (outcome.code, outcome.out) == (2, "")


@pytest.mark.parametrize("section", [*SECTIONS, *in_config(ROLES, "one")])
def test_every_section_refuses_a_stray_key(cli: Cli, section: str) -> None:
    outcome = cli("run", f"+{section}.stray=1", *(["model=qwen3"] if section == "model" else []))
    assert "stray" in outcome.error
    assert outcome.code == 1


@pytest.mark.parametrize(
    "key",
    [
        f"{name}.{key}" for name, schema in SECTIONS.items() for key in field_names(schema)
        if key != "structured_outputs"  # which is one
    ],
)  # fmt: skip
def test_no_option_takes_a_mapping(cli: Cli, key: str) -> None:
    outcome = cli("run", f"{key}={{a: 1}}")
    assert outcome.error.startswith(f"{key} must be ")
    assert outcome.code == 1


def test_an_architecture_that_no_plugin_serves(cli: Cli, tmp_path: Path) -> None:
    config = json.loads((BUNDLED / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = cli("run", f"checkpoint={tmp_path}", "engine.load_format=dummy")
    assert "MambaForCausalLM" in outcome.error
    assert "Qwen3ForCausalLM" in outcome.error
    assert outcome.code == 1


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_missing_or_corrupt_checkpoint_file(cli: Cli, tmp_path: Path, file: str, damage: str) -> None:
    checkpoint = shutil.copytree(BUNDLED, tmp_path / "checkpoint")
    path = checkpoint / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"\xff\x00garbage")
    outcome = cli("run", f"checkpoint={checkpoint}")
    assert str(checkpoint) in outcome.error or file in outcome.error
    assert outcome.code == 1


def test_a_device_that_is_not_there(cli: Cli) -> None:
    outcome = cli("run", "engine.device=cuda:99")
    assert "cuda:99" in outcome.error
    assert outcome.code == 1
