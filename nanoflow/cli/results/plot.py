"""Two columns of a sweep's results as a plot. Only this file knows matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.cli.results.table import Results, with_overrides
from nanoflow.core.config.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Groups = dict[Any, dict[Any, float]]  # y by x, of each line or colour of bars


def plot(results: Results, x: str, y: str, by: str | None, path: Path) -> None:
    """`y` over `x`, a line for each value of `by`; bars if `x` is no number.

    Raises:
        ConfigError: no such column, no numbers to plot, no matplotlib, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'nanoflow-engine[plots]'.") from error
    results.require(x, y, *([by] if by else []))
    rows = _rows(results, x, y)
    groups: Groups = {}
    for row in rows:
        groups.setdefault(row.get(by) if by else y, {})[row[x]] = row[y]
    places = list(dict.fromkeys(row[x] for row in rows))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    if all(isinstance(place, int | float) for place in places):
        for label, points in groups.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=str(label))
    else:
        _bars(axes, groups, places)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    if by:
        axes.legend(title=by)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The plot {path} can't be written: {error}.") from error


def _rows(results: Results, x: str, y: str) -> list[dict[str, Any]]:
    """The jobs that have both."""
    rows = [row for row in map(with_overrides, results.jobs) if None not in (row.get(x), row.get(y))]
    if not rows or not all(isinstance(row[y], int | float) for row in rows):
        raise ConfigError(f"The column {y!r} holds no numbers to plot; choose another one for y.")
    return rows


def _bars(axes: Axes, groups: Groups, places: list[Any]) -> None:
    """At each place a bar a group, side by side."""
    width = 0.8 / len(groups)
    for index, (label, points) in enumerate(groups.items()):
        at = [places.index(place) + (index - (len(groups) - 1) / 2) * width for place in points]
        axes.bar(at, list(points.values()), width, label=str(label))
    axes.set_xticks(range(len(places)), list(map(str, places)))
