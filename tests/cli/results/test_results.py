"""`nanoflow results`: what a sweep left in its folder, sorted, as CSV and as a plot."""

from __future__ import annotations

import builtins
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli

COLUMNS = {"ttft_ms": "TTFT ms", "rate": "tok/s"}


@pytest.fixture
def sweep(cli: Cli) -> Path:
    """A folder with three jobs that went well and one that failed."""
    folder = Path("runs/one")
    for number, (name, seqs, ttft) in enumerate(
        [("fcfs", 4, 9.5), ("fcfs", 16, 30), ("sjf", 4, 12), ("sjf", 16, None)]
    ):
        record: dict[str, Any] = {"job": number, "overrides": [f"scheduler={name}", f"scheduler.max_num_seqs={seqs}"]}
        if ttft is None:
            record |= {"status": "failed", "error": "no"}
        else:
            record |= {"status": "ok", "error": "", "columns": COLUMNS, "ttft_ms": ttft, "rate": 100 * seqs}
            record |= {"scheduler": name, "hidden": 50 - ttft}
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "result.json").write_text(json.dumps(record))
    return folder


def jobs(out: str) -> list[int]:
    """Their numbers in the order of the table."""
    return [int(line.split("|")[0]) for line in out.splitlines()[2:]]


def test_the_table(cli: Cli, sweep: Path) -> None:
    outcome = cli("results", str(sweep))
    assert (outcome.code, outcome.err) == (0, "")
    assert jobs(outcome.out) == [0, 1, 2, 3]
    assert [cell.strip() for cell in outcome.out.splitlines()[0].split("|")] == [
        "job", "overrides", "status", "TTFT ms", "tok/s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("ttft_ms", [0, 2, 1, 3]),
        ("ttft_ms --reverse", [1, 2, 0, 3]),
        ("job --reverse", [3, 2, 1, 0]),
        ("hidden", [1, 2, 0, 3]),
        ("scheduler.max_num_seqs", [0, 2, 1, 3]),
        ("scheduler --reverse", [2, 3, 0, 1]),
    ],
)
def test_sorted_by_any_column(cli: Cli, sweep: Path, column: str, expected: list[int]) -> None:
    """Jobs that have no value come last; a column that the table doesn't show is added to it."""
    out = cli("results", str(sweep), "--sort", *column.split()).out
    assert jobs(out) == expected
    assert ("hidden" in out) == (column == "hidden")


def test_csv(cli: Cli, sweep: Path) -> None:
    cli("results", str(sweep), "--sort", "ttft_ms", "--reverse", "--csv", "out.csv")
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ttft_ms"] for row in rows] == ["30", "12", "9.5", ""]
    assert rows[0]["overrides"] == "scheduler=fcfs scheduler.max_num_seqs=16"
    assert "columns" not in rows[0]


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("x", ["scheduler", "scheduler.max_num_seqs"])
def test_a_plot(cli: Cli, sweep: Path, x: str, kind: str) -> None:
    by = {"scheduler": "scheduler.max_num_seqs", "scheduler.max_num_seqs": "scheduler"}[x]
    outcome = cli("results", str(sweep), "--plot", f"x={x}", "y=ttft_ms", f"by={by}", f"file=plot.{kind}")
    assert outcome.code == 0
    written = Path(f"plot.{kind}").read_bytes()
    assert written.startswith(b"<?xml" if kind == "svg" else b"\x89PNG")


def test_a_plot_goes_to_the_folder(cli: Cli, sweep: Path) -> None:
    assert cli("results", str(sweep), "--plot", "x=rate", "y=ttft_ms").code == 0
    assert (sweep / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "the following arguments are required: folder"),
        (("nowhere",), 1, "nowhere is not the folder of a sweep: it holds no */result.json."),
        (("runs/one", "--sort", "ttft"), 1, "There is no column 'ttft'. Did you mean 'ttft_ms'?"),
        (("runs/one", "--csv", "no/such.csv"), 1, "no/such.csv can't be written"),
        (("runs/one", "--plot", "x=rate"), 2, "--plot takes x=COLUMN y=COLUMN"),
        (("runs/one", "--plot", "x=rate", "y=scheduler"), 1, "'scheduler' holds no numbers to plot"),
        (("runs/one", "--plot", "x=rate", "y=ttft_ms", "file=a.xyz"), 1, "The plot a.xyz can't be written"),
        (("runs/one", "--best"), 2, "unrecognized arguments: --best"),
    ],
)
def test_mistakes(cli: Cli, sweep: Path, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    outcome = cli("results", *arguments)
    assert outcome.code == code
    assert sentence in outcome.error


def test_without_matplotlib(cli: Cli, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    outcome = cli("results", str(sweep), "--plot", "x=rate", "y=ttft_ms")
    assert "pip install 'nanoflow-engine[plots]'" in outcome.error
