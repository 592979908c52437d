"""`nanoflow results`: what a sweep left in its folder, sorted, as CSV and as a plot."""

from __future__ import annotations

import builtins
import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.results.points import label
from nanoflow.cli.results.table import Results
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
        "job", "overrides", "status", "TTFT ms", "tok/s", "error",
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


def test_the_reason_of_a_failure_stands_in_the_table(cli: Cli, sweep: Path) -> None:
    assert cli("results", str(sweep)).out.splitlines()[-1].split("|")[-1].strip() == "no"
    (sweep / "3" / "result.json").unlink()
    assert "error" not in cli("results", str(sweep)).out


def test_without_a_folder_it_is_the_newest_sweep(cli: Cli, sweep: Path) -> None:
    newer = Path("runs/a")
    (newer / "0").mkdir(parents=True)
    (newer / "0" / "result.json").write_text(json.dumps({"job": 0, "overrides": [], "status": "interrupted"}))
    for place in sweep.glob("*/result.json"):
        os.utime(place, (1, 1))
    outcome = cli("results")
    assert (jobs(outcome.out), outcome.err) == ([0], f"{newer}\n")


def test_without_any_sweep(cli: Cli) -> None:
    outcome = cli("results")
    assert (outcome.code, outcome.error) == (2, "There is no sweep in runs/ here; write `nanoflow results FOLDER`.")


def test_jobs_that_share_a_point_become_their_mean_with_the_spread(
    cli: Cli, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []
    from matplotlib.axes import Axes

    def errorbar(axes: Axes, x: Any, y: Any, **options: Any) -> None:
        drawn.append({"x": x, "y": y, "yerr": options["yerr"]})

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    outcome = cli("results", str(sweep), "--plot", "x=scheduler.max_num_seqs", "y=ttft_ms")
    assert drawn == [{"x": [4, 16], "y": [10.75, 30], "yerr": [(1.25, 0), (1.25, 0)]}]
    assert "means of up to 2 jobs that differ in scheduler; bars go from the least to the greatest" in outcome.err
    drawn.clear()
    outcome = cli("results", str(sweep), "--plot", "x=scheduler.max_num_seqs", "y=ttft_ms", "by=scheduler")
    assert [line["yerr"] for line in drawn] == [None, None]
    assert "means" not in outcome.err


def test_bars_have_the_spread_too(cli: Cli, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[Any] = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(
        Axes, "bar", lambda axes, at, height, width, **options: heights.append((height, options["yerr"]))
    )
    cli("results", str(sweep), "--plot", "x=scheduler", "y=ttft_ms")
    assert heights == [([19.75, 12], [(10.25, 0), (10.25, 0)])]


def test_labels_have_units_and_integers_have_whole_ticks(cli: Cli, sweep: Path) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda self, *args, **options: (figures.append(self), save(self, *args, **options))
        )
        cli("results", str(sweep), "--plot", "x=scheduler.max_num_seqs", "y=ttft_ms", "by=scheduler")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("scheduler.max_num_seqs", "TTFT (ms)")
    assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("ttft_ms", "TTFT (ms)"), ("output_tokens_per_s", "output (tok/s)"), ("hit_rate_percent", "hit rate (%)"),
        ("seconds", "seconds (s)"), ("engine.kv_cache_gib", "engine.kv_cache_gib (GiB)"), ("rate", "tok/s"),
        ("preemptions", "preemptions"), ("bandwidth_gb_per_s", "bandwidth (GB/s)"),
    ],
)  # fmt: skip
def test_a_label(column: str, expected: str) -> None:
    assert label(Results([], COLUMNS), column) == expected
