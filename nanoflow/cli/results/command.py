"""The command `nanoflow results`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

from nanoflow.cli.errors import UsageError
from nanoflow.cli.results import jobs
from nanoflow.cli.results.plot import plot
from nanoflow.cli.results.table import Results

RUNS = Path("runs")  # where sweeps go by default
USAGE = """\
Usage: nanoflow results [FOLDER] [--sort COLUMN [--reverse]] [--csv FILE]
                                 [--plot x=COLUMN y=COLUMN [by=COLUMN] [file=FILE]]

Shows what the jobs of a sweep found out, again; without a folder, of the newest one in runs/.

  nanoflow results runs/2026-11-22_15-51-17_907266 --sort ttft_ms
  nanoflow results runs/... --sort output_tokens_per_s --reverse --csv best.csv     the greatest first
  nanoflow results runs/... --plot x=scheduler y=ttft_p99_ms by=block_manager file=ttft.svg

Columns are those of results.csv; KEY=VALUE overrides are columns, too. A plot needs matplotlib
(nanoflow-engine[plots]); its file's ending says of what kind it is, and plot.png in the folder is where it goes by
default. Jobs that share a point become their mean, with a bar from the least to the greatest."""


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    parser = _Parser(prog="nanoflow results", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sort")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", nargs="+")
    options = parser.parse_args(argv)
    folder = options.folder or _newest()
    found = Results.read(folder)
    if options.sort:
        found = found.sorted(options.sort, options.reverse)
    print(found.table())
    if options.csv:
        found.write_csv(options.csv)
    if options.plot:
        axes = _axes(options.plot)
        path = Path(axes.get("file", folder / "plot.png"))
        note = plot(found, axes["x"], axes["y"], axes.get("by"), path)
        print(f"The plot is in {path}{f'; {note}' if note else ''}", file=sys.stderr)
    return 0


def _newest() -> Path:
    """The sweep in runs/ whose last job began or ended last; it is named on standard error.

    Raises:
        UsageError: there is none.
    """
    results = [(jobs.last_change(folder), folder) for folder in RUNS.glob("*") if jobs.folders(folder)]
    if not results:
        raise UsageError(f"There is no sweep in {RUNS}/ here; write `nanoflow results FOLDER`.")
    folder = max(results)[1]
    print(folder, file=sys.stderr)
    return folder


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `nanoflow results --help` says more.")


def _axes(items: list[str]) -> dict[str, str]:
    axes = dict(item.partition("=")[::2] for item in items)
    if not {"x", "y"} <= set(axes) <= {"x", "y", "by", "file"} or not all(axes.values()):
        raise UsageError(f"--plot takes x=COLUMN y=COLUMN [by=COLUMN] [file=FILE], got {' '.join(items)}.")
    return axes
