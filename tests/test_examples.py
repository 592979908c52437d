"""The packages in `examples/`, built, installed beside nanoflow's wheel in a fresh environment, used, and uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nanoflow.testing.checkpoints import generate, make_checkpoint, oracle_of
from tests.core.scripted import byte_level

ROOT = Path(__file__).parents[1]
EXAMPLES = ["nanoflow-gpt2", "nanoflow-sjf"]
PROMPT = "To be, or not to be"


def call(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": cwd, "env": environment | {"HF_HUB_OFFLINE": "1"}, "timeout": 300, "check": False}
    return subprocess.run([str(argument) for argument in argv], capture_output=True, text=True, **options)


def done(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


class Environment:
    """A virtual environment with what is installed here, but for nanoflow and plugins, and with wheels of its own."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.cwd = folder / "cwd"
        self.cwd.mkdir()

    def pip(self, *argv: object) -> None:
        done(call(sys.executable, "-m", "pip", "--python", self.bin / "python", *argv))

    def install(self, wheels: list[Path]) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", *wheels)
        # Only then what wheels need: pip would take this nanoflow for an older one of theirs.
        place = done(call(self.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (Path(place.strip()) / "borrowed.pth").write_text("\n".join(site.getsitepackages()))

    def nanoflow(self, *argv: object) -> subprocess.CompletedProcess[str]:
        return call(self.bin / "nanoflow", *argv, cwd=self.cwd)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("examples")
    for source in (ROOT, *(ROOT / "examples" / name for name in EXAMPLES)):
        done(call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheels", cwd=source))
    made = Environment(folder / "env")
    made.install(sorted((folder / "wheels").glob("*.whl")))
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with a tokenizer."""
    tokenizer = byte_level()
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    folder = make_checkpoint(tmp_path_factory.mktemp("gpt2"), config | {"vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_their_own_tests_pass(name: str, environment: Environment, tmp_path: Path) -> None:
    tests = shutil.copytree(ROOT / "examples" / name / "tests", tmp_path / "tests")
    printed = done(
        call(environment.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=tmp_path)
    )
    assert " passed" in printed
    assert "skipped" not in printed


def test_they_come_and_go(environment: Environment, gpt2: Path, tmp_path: Path) -> None:
    assert str(environment.bin.parent) in done(call(environment.bin / "python", "-c", "import nanoflow as n; print(n)"))
    listed = done(environment.nanoflow("plugins"))
    for row in (("model", "gpt2", "nanoflow-gpt2"), ("scheduler", "shortest", "nanoflow-sjf")):
        assert row in [tuple(cell.strip() for cell in line.split("|")[:3]) for line in listed.splitlines()]

    output = tmp_path / "out.jsonl"
    settings = (f"checkpoint={gpt2}", f'prompts=["{PROMPT}"]', "sampling.temperature=0", "sampling.max_tokens=8",
                "sampling.ignore_eos=true", "engine.device=cpu", "engine.dtype=float32")  # fmt: skip
    assert "model=gpt2" in done(environment.nanoflow("run", "model=gpt2", f"output={output}", *settings))
    prompt = byte_level()(PROMPT)["input_ids"]
    expected, _ = generate(oracle_of(gpt2), prompt, 8)
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["token_ids"] == expected

    table = done(environment.nanoflow("run", "-m", "scheduler=fcfs,shortest,shortest_impatient", *settings))
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.count("|") > 4]
    jobs = {row[1]: row[2] for row in rows if row[0].isdigit()}
    assert jobs == {f"scheduler={name}": "ok" for name in ("fcfs", "shortest", "shortest_impatient")}

    environment.pip("uninstall", "--quiet", "--yes", *EXAMPLES)
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
