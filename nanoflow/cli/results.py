"""`nanoflow results`: the table of a sweep, sorted by a column, as CSV, or two of its columns as a plot."""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nanoflow.cli import UsageError, show
from nanoflow.core.config.errors import ConfigError, did_you_mean

OK, FAILED, INTERRUPTED = "ok", "failed", "interrupted"
RESULT = "result.json"  # in each job's folder
FIRST_COLUMNS = ("job", "overrides", "status")

USAGE = """\
Usage: nanoflow results FOLDER [--sort COLUMN [--reverse]] [--csv FILE]
                               [--plot x=COLUMN y=COLUMN [by=COLUMN] [file=FILE]]

Shows what the jobs of a sweep found out, again.

  nanoflow results runs/2026-11-22_15-51-17_907266 --sort ttft_ms
  nanoflow results runs/... --sort output_tokens_per_s --reverse --csv best.csv     the greatest first
  nanoflow results runs/... --plot x=scheduler y=ttft_p99_ms by=block_manager file=ttft.svg

Columns are those of results.csv; KEY=VALUE overrides are columns, too. A plot needs matplotlib (nanoflow[plots]); its
file's ending says of what kind it is, and plot.png in the folder is where it goes by default."""


@dataclass(frozen=True)
class Results:
    """What the jobs of a sweep found out.

    Attributes:
        jobs: a record of each, in their order.
        titles: of the columns that the table shows.
    """

    jobs: list[dict[str, Any]]
    titles: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """From a sweep's folder.

        Raises:
            ConfigError: it is no such folder.
        """
        jobs = [read_job(path.parent) for path in folder.glob(f"*/{RESULT}")]
        if not jobs:
            raise ConfigError(f"{folder} is not the folder of a sweep: it holds no */{RESULT}.")
        titles = {key: key for key in FIRST_COLUMNS}
        jobs.sort(key=lambda record: record["job"])
        for record in jobs:
            titles |= record.pop("columns", {})
        return cls(jobs, titles)

    def columns(self) -> list[str]:
        """All there are."""
        return list(dict.fromkeys(key for record in self.jobs for key in _with_overrides(record)))

    def sorted(self, column: str, reverse: bool = False) -> Results:
        """By a column, the least first or the greatest; jobs without a value come last.

        Raises:
            ConfigError: there is no such column.
        """
        key = self._known(column)
        having = [record for record in self.jobs if _with_overrides(record).get(key) is not None]
        having.sort(key=lambda record: _order(_with_overrides(record)[key]), reverse=reverse)
        extra = {} if key in self.titles or key not in having[0] else {key: key}
        return Results(having + [r for r in self.jobs if r not in having], self.titles | extra)

    def table(self) -> str:
        """A line a job; what all jobs have been told is left out."""
        told = [set(record["overrides"]) for record in self.jobs]
        shared = set.intersection(*told) if len(told) > 1 else set()
        rows = [
            {**record, "overrides": " ".join(item for item in record["overrides"] if item not in shared)}
            for record in self.jobs
        ]
        return show.table(list(self.titles.values()), ([row.get(key) for key in self.titles] for row in rows))

    def write_csv(self, path: Path) -> None:
        """All columns but single overrides.

        Raises:
            ConfigError: the file can't be written.
        """
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                names = list(dict.fromkeys(key for record in self.jobs for key in record))
                writer = csv.DictWriter(file, fieldnames=names)
                writer.writeheader()
                writer.writerows({**record, "overrides": " ".join(record["overrides"])} for record in self.jobs)
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}.") from error

    def plot(self, x: str, y: str, by: str | None, path: Path) -> None:
        """`y` over `x`, a line for each value of `by`; bars if `x` is no number.

        Raises:
            ConfigError: no such column, no numbers to plot, no matplotlib, or the file can't be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("A plot needs matplotlib: pip install 'nanoflow[plots]'.") from error
        for column in (x, y, *([by] if by else [])):
            self._known(column)
        rows = [row for row in map(_with_overrides, self.jobs) if None not in (row.get(x), row.get(y))]
        if not rows or not all(isinstance(row[y], int | float) for row in rows):
            raise ConfigError(f"The column {y!r} holds no numbers to plot; choose another one for y.")
        groups: dict[Any, dict[Any, float]] = {}
        for row in rows:
            groups.setdefault(row.get(by) if by else y, {})[row[x]] = row[y]
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        places = list(dict.fromkeys(row[x] for row in rows))
        for index, (label, points) in enumerate(groups.items()):
            if all(isinstance(place, int | float) for place in places):
                axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=str(label))
            else:
                width = 0.8 / len(groups)
                at = [places.index(place) + (index - (len(groups) - 1) / 2) * width for place in points]
                axes.bar(at, list(points.values()), width, label=str(label))
                axes.set_xticks(range(len(places)), list(map(str, places)))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        if by:
            axes.legend(title=by)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The plot {path} can't be written: {error}.") from error

    def _known(self, column: str) -> str:
        known = self.columns()
        if column not in known:
            raise ConfigError(f"There is no column {column!r}.{did_you_mean(column, known) or f' There are: {known}.'}")
        return column


def read_job(folder: Path) -> dict[str, Any]:
    """The record that a job left in its folder."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    parser = _Parser(prog="nanoflow results", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sort")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", nargs="+")
    options = parser.parse_args(argv)
    found = Results.read(options.folder)
    if options.sort:
        found = found.sorted(options.sort, options.reverse)
    print(found.table())
    if options.csv:
        found.write_csv(options.csv)
    if options.plot:
        axes = _axes(options.plot)
        path = Path(axes.get("file", options.folder / "plot.png"))
        found.plot(axes["x"], axes["y"], axes.get("by"), path)
        print(f"The plot is in {path}", file=sys.stderr)
    return 0


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `nanoflow results --help` says more.")


def _axes(items: list[str]) -> dict[str, str]:
    axes = dict(item.partition("=")[::2] for item in items)
    if not {"x", "y"} <= set(axes) <= {"x", "y", "by", "file"} or not all(axes.values()):
        raise UsageError(f"--plot takes x=COLUMN y=COLUMN [by=COLUMN] [file=FILE], got {' '.join(items)}.")
    return axes


def _with_overrides(record: dict[str, Any]) -> dict[str, Any]:
    """The record, and each of its overrides as a column, but for those that a column tells already."""
    told = (item.partition("=")[::2] for item in record["overrides"])
    return {name.lstrip("+~"): _value(value) for name, value in told} | record


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers before texts, and lists as texts."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else str(value)
