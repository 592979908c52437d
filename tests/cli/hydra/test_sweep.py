"""`nanoflow run -m`: every job in turn, failures included, and a table that stays."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from nanoflow.cli.run import job
from tests.cli.conftest import Cli

pytestmark = pytest.mark.slow
SHORT = ("prompts=[HAMLET]", "sampling.max_tokens=2")


def folders() -> list[Path]:
    return sorted(Path("runs").iterdir())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_job_runs_and_is_kept(cli: Cli) -> None:
    outcome = cli("run", "-m", "scheduler.max_num_seqs=4,16", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = folders()
    first, second = rows(folder)
    assert [first["status"], second["status"]] == ["ok", "ok"]
    assert "scheduler.max_num_seqs=16" in second["overrides"]
    assert float(first["output_tokens_per_s"]) > 0
    assert float(first["ttft_ms"]) > 0
    assert (first["requests"], first["output_tokens"], first["scheduler"]) == ("1", "2", "fcfs")
    assert yaml.safe_load((folder / "1" / "config.yaml").read_text())["scheduler"]["max_num_seqs"] == 16
    assert json.loads((folder / "1" / "result.json").read_text())["status"] == "ok"
    table = (folder / "results.txt").read_text()
    assert table in outcome.out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "scheduler.max_num_seqs=4",  # what all jobs share is left out
        "scheduler.max_num_seqs=16",
    ]
    assert outcome.out.count("output tok/s, TTFT") == 2
    assert str(folder) in outcome.out


def test_a_job_that_fails_does_not_stop_the_others(cli: Cli) -> None:
    outcome = cli("run", "-m", "scheduler=nope,fcfs", "engine.block_size=0,16", *SHORT)
    assert outcome.code == 1
    assert [row["status"] for row in rows(*folders())] == ["failed", "failed", "failed", "ok"]
    assert "job 0 (scheduler=nope engine.block_size=0" in outcome.err
    assert "There is no scheduler called 'nope'" in outcome.err
    assert "engine.block_size must be an integer >= 1, got 0." in outcome.err
    assert rows(*folders())[2]["error"] == "engine.block_size must be an integer >= 1, got 0."
    assert outcome.err.count("\n") == 3
    assert outcome.out.count("failed") == 3


@pytest.mark.parametrize("key", ["+engine.zzz=1,2", "scheduler.zzz=1,2", "sampling.temperature=hot,cold"])
def test_a_sweep_of_failures_fails(cli: Cli, key: str) -> None:
    outcome = cli("run", "-m", key, *SHORT)
    assert outcome.code == 1
    assert [row["status"] for row in rows(*folders())] == ["failed", "failed"]


def test_a_key_that_no_job_can_have_is_refused_at_once(cli: Cli) -> None:
    outcome = cli("run", "-m", "prompt=a,b")
    assert outcome.code == 1
    assert "Did you mean 'prompts'?" in outcome.error


def test_a_bug_in_a_job_shows_its_traceback_and_the_rest_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job.run

    def buggy(config, *args, **options):
        if config.engine.seed == 1:
            raise ZeroDivisionError("a bug")
        return run(config, *args, **options)

    monkeypatch.setattr(job, "run", buggy)
    outcome = cli("run", "-m", "engine.seed=1,2", *SHORT)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert [row["status"] for row in rows(*folders())] == ["failed", "ok"]
    assert rows(*folders())[0]["error"] == "ZeroDivisionError: a bug"


def test_ctrl_c_keeps_what_was_done(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job.run

    def interrupted(config, *args, **options):
        if config.engine.seed == 2:
            raise KeyboardInterrupt
        return run(config, *args, **options)

    monkeypatch.setattr(job, "run", interrupted)
    outcome = cli("run", "-m", "engine.seed=1,2,3", *SHORT)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert [row["status"] for row in rows(*folders())] == ["ok", "interrupted"]


def test_outputs_go_to_the_folders_of_their_jobs(cli: Cli) -> None:
    cli("run", "-m", "sampling.max_tokens=1,2", "prompts=[HAMLET]", "output=out.jsonl")
    (folder,) = folders()
    lengths = [len(json.loads((folder / n / "out.jsonl").read_text())["token_ids"]) for n in "01"]
    assert lengths == [1, 2]
    assert not Path("out.jsonl").exists()


def test_two_sweeps_in_one_process_do_not_mix(cli: Cli) -> None:
    cli("run", "-m", "engine.seed=1,2", *SHORT)
    outcome = cli("run", "-m", "sampling.seed=3", *SHORT)
    assert [len(rows(folder)) for folder in folders()] == [2, 1]
    assert "engine.seed" not in outcome.out


def test_the_folder_can_be_chosen(cli: Cli) -> None:
    cli("run", "-m", "engine.seed=1", "hydra.sweep.dir=here", *SHORT)
    assert len(rows(Path("here"))) == 1
    assert not Path("runs").exists()
