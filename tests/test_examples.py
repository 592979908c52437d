"""The packages in `examples/`, and that of the tutorial: installed in a fresh environment, used, and uninstalled."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from nanoflow.core.registry.contract import CONTRACT
from nanoflow.testing.checkpoints import generate, make_checkpoint, oracle_of
from tests.core.scripted import byte_level
from tests.environment import ROOT, Environment, build_wheel, done

pytestmark = pytest.mark.slow
EXAMPLES = ["nanoflow-gpt2", "nanoflow-sjf"]
PROMPT = "To be, or not to be"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("examples")
    for source in (ROOT, *(ROOT / "examples" / name for name in EXAMPLES)):
        build_wheel(source, folder / "wheels")
    return Environment(folder / "env", folder / "wheels")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with a tokenizer."""
    tokenizer = byte_level()
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    folder = make_checkpoint(tmp_path_factory.mktemp("gpt2"), config | {"vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


def test_their_own_tests_pass(environment: Environment, tmp_path: Path) -> None:
    """Away from the sources, so that it is the wheels that are tested."""
    tests = [shutil.copytree(ROOT / "examples" / name / "tests", tmp_path / name) for name in EXAMPLES]
    assert " passed" in environment.pytest(*tests)


def test_the_tutorial(environment: Environment, tmp_path: Path) -> None:
    """The files of docs/extension.md make a package that can be installed, and its commands do what they should."""
    text = (ROOT / "docs" / "extension.md").read_text(encoding="utf-8")
    files = re.findall(r"^\*\*\d\. [^`]*`([\w/.]+)`.*?```\w+\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == [
        "hasty/__init__.py", "pyproject.toml", "hasty/conf/scheduler/hurried.yaml", "tests/test_hasty.py"
    ]  # fmt: skip
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    environment.install(tmp_path)
    install, test, *commands = re.findall(r"^\$ (.*)", text, re.MULTILINE)[:5]
    assert (install, test) == ("pip install -e '.[test]'", "python -m pytest tests")
    assert " passed" in environment.pytest(tmp_path / "tests")
    listed, run, sweep = (done(environment.nanoflow(*shlex.split(command)[1:])) for command in commands)
    assert re.search(r"scheduler +\| hasty +\| hasty +\| 1.0 +\| yes", listed)
    assert "scheduler=hasty" in run
    assert len(re.findall(r"scheduler=(?:fcfs|hasty|hurried) +\| ok", sweep)) == 3
    environment.pip("uninstall", "--yes", "hasty")
    assert "hasty" not in done(environment.nanoflow("plugins"))


def test_a_package_for_an_older_contract(environment: Environment) -> None:
    """It is left out, with a sentence about what has changed since; everything else works on."""
    environment.install(ROOT / "tests" / "packages" / "nanoflow-pinned")
    process = environment.nanoflow("plugins")
    assert "| pinned" not in done(process)
    (change,) = CONTRACT.changes
    assert process.stderr == (
        "nanoflow: warning: Plugin 'pinned' of nanoflow-pinned 0.1.0 was left out: it is made for contract 0, and this "
        f"is contract 1. Contract 1: {change.what}\n"
    )
    assert "plugins import from nanoflow, nanoflow.plugin and nanoflow.testing alone" in process.stderr
    environment.pip("uninstall", "--yes", "nanoflow-pinned")
    assert environment.nanoflow("plugins").stderr == ""


def test_they_come_and_go(environment: Environment, gpt2: Path, tmp_path: Path) -> None:
    listed = done(environment.nanoflow("plugins"))
    for row in (("model", "gpt2", "nanoflow-gpt2"), ("scheduler", "shortest", "nanoflow-sjf")):
        assert row in [tuple(cell.strip() for cell in line.split("|")[:3]) for line in listed.splitlines()]

    output = tmp_path / "out.jsonl"
    settings = (f"checkpoint={gpt2}", f'prompts=["{PROMPT}"]', "sampling.temperature=0", "sampling.max_tokens=8",
                "sampling.ignore_eos=true", "engine.device=cpu", "engine.dtype=float32")  # fmt: skip
    assert "model=gpt2" in done(environment.nanoflow("run", "model=gpt2", f"output={output}", *settings))
    expected, _ = generate(oracle_of(gpt2), byte_level()(PROMPT)["input_ids"], 8)
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["token_ids"] == expected

    table = done(environment.nanoflow("run", "-m", "scheduler=fcfs,shortest,shortest_impatient", *settings))
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.count("|") > 4]
    jobs = {row[1]: row[2] for row in rows if row[0].isdigit()}
    assert jobs == {f"scheduler={name}": "ok" for name in ("fcfs", "shortest", "shortest_impatient")}

    environment.pip("uninstall", "--yes", *EXAMPLES)
    process = environment.nanoflow("plugins")
    assert "gpt2" not in process.stdout + process.stderr
    assert "shortest" not in process.stdout + process.stderr
    for setting, sentence in {
        "model=gpt2": "There is no model called 'gpt2'; installed are: ",
        "scheduler=shortest": "There is no scheduler called 'shortest'; installed are: ",
    }.items():
        process = environment.nanoflow("run", setting, *settings)
        assert process.returncode == 1
        assert process.stderr.startswith(f"nanoflow: error: {sentence}")
