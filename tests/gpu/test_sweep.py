"""A sweep's jobs on a GPU: each has a process of its own, and this one takes none of the GPU's memory."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHORT = ("prompts=[HAMLET]", "sampling.max_tokens=4", "engine.kv_cache_gib=0.1", "engine.enforce_eager=true")


def sweep(folder: Path, *overrides: str) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "nanoflow", "run", "-m", *SHORT, *overrides, f"hydra.sweep.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_jobs_have_processes_and_gpus_of_their_own(tmp_path: Path) -> None:
    rows = sweep(tmp_path / "here", "scheduler=fcfs,lpm")
    assert [(row["status"], row["device"]) for row in rows] == [("ok", torch.cuda.get_device_name(0))] * 2
    assert list((tmp_path / "here").glob(".gpu-*.lock")), "each job locked its GPU"


def test_side_by_side(tmp_path: Path) -> None:
    """More jobs at a time than GPUs: they wait for each other."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    rows = sweep(tmp_path / "there", "scheduler=fcfs,lpm,sjf", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3")
    assert [row["status"] for row in rows] == ["ok"] * 3
