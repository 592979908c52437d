"""Sweeps under other launchers, and one GPU for each job."""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from nanoflow.cli.hydra import gpus
from tests.cli.conftest import Cli

SHORT = ("prompts=[HAMLET]", "sampling.max_tokens=2", "engine.device=cpu")


def config(device: str = "auto", ranks: int = 1) -> DictConfig:
    return OmegaConf.create({"engine": {"device": device, "tensor_parallel_size": ranks}})


@pytest.fixture
def pool() -> Iterator[None]:
    """joblib keeps its processes for the next sweep; they end here."""
    yield
    if loky := sys.modules.get("joblib.externals.loky"):
        loky.get_reusable_executor(max_workers=1).shutdown(wait=True)


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_in_other_processes(cli: Cli, launcher: tuple[str, ...]) -> None:
    """The table and the files are those of a sweep in one process; one job fails and the others go on."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('=')[2].partition('_')[0]}_launcher")
    outcome = cli("run", "-m", "scheduler.max_num_seqs=0,4", *SHORT, *launcher)
    assert outcome.code == 1
    (folder,) = Path("runs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "max_num_seqs must be an integer >= 1" in rows[0]["error"]
    assert rows[1]["output_tokens"] == "2"
    assert (folder / "results.txt").read_text() in outcome.out


@pytest.mark.parametrize(("device", "there", "expected"), [
    ("auto", True, True), ("auto", False, False), ("cpu", True, False), ("cuda", True, True), ("cuda:1", True, True),
])  # fmt: skip
def test_who_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str, there: bool, expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert gpus.wanted(config(device)) == expected


def seen(number: int, folder: Path, device: str = "auto", ranks: int = 1) -> str | None:
    """What the processes of a job would see."""
    with gpus.reserved(config(device, ranks), number, folder):
        return os.environ.get(gpus.VISIBLE)


def test_jobs_go_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "2,5,7")
    assert [seen(number, tmp_path) for number in range(4)] == ["2", "5", "7", "2"]
    assert os.environ[gpus.VISIBLE] == "2,5,7"
    assert seen(1, tmp_path, "cuda:1") == "2,5,7", "the user has chosen"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert seen(1, tmp_path) == "2,5,7", "Slurm has chosen"


def test_all_gpus_are_visible_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [seen(number, tmp_path) for number in range(3)] == ["0", "1", "0"]
    assert gpus.VISIBLE not in os.environ


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "0,1,2,3")
    assert [seen(number, tmp_path, ranks=2) for number in range(3)] == ["0,1", "2,3", "0,1"]
    assert seen(0, tmp_path, ranks=8) == "0,1,2,3", "the engine says that these are too few"


def test_no_two_jobs_have_the_same_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second job finds the first GPU taken; the third wants both, and has none before it has both."""
    monkeypatch.setattr(gpus, "POLL", 0.01)
    devices = ["0", "1"]
    with gpus._first_free(devices, 1, tmp_path) as first, gpus._first_free(devices, 1, tmp_path) as second:
        assert (first, second) == (["0"], ["1"])
        got: list[Any] = []

        def wait() -> None:
            with gpus._first_free(devices, 2, tmp_path) as third:
                got.append(third)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        assert got == []
    waiting.join(5)
    assert got == [devices]


@pytest.mark.slow
def test_a_job_in_a_process_of_its_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU, though the job asks for none: its result comes back through its folder."""
    monkeypatch.setattr(gpus, "wanted", lambda composed: True)
    monkeypatch.setattr(gpus, "visible", list)
    outcome = cli("run", "-m", "scheduler.max_num_seqs=4,0", *SHORT)
    assert outcome.code == 1
    (table,) = Path("runs").glob("*/results.txt")
    assert [line.split("|")[2].strip() for line in table.read_text().splitlines()[2:]] == ["ok", "failed"]
