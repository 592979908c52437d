"""Two columns of a sweep's results as a plot. Only this file knows matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.results.points import Points, label, mean, spread
from nanoflow.cli.results.table import Results
from nanoflow.core.config.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(results: Results, x: str, y: str, by: str | None, path: Path) -> str | None:
    """`y` over `x`, a line for each value of `by`; bars if `x` is no number. Jobs that share a point become their mean.

    Returns:
        What a point stands for, if not for one job.

    Raises:
        ConfigError: no such column, no numbers to plot, no matplotlib, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'nanoflow-engine[plots]'.") from error
    points = Points.of(results, x, y, by)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    if all(isinstance(place, int | float) for place in points.places):
        _lines(axes, points)
    else:
        _bars(axes, points)
    axes.set_xlabel(label(results, x))
    axes.set_ylabel(label(results, y))
    axes.set_ylim(bottom=0)
    if all(isinstance(value, int) for value in points.values):
        axes.yaxis.get_major_locator().set_params(integer=True)
    if by:
        axes.legend(title=label(results, by))
    if points.note:
        axes.set_title(points.note, fontsize="x-small", wrap=True)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The plot {path} can't be written: {error}.") from error
    return points.note


def _lines(axes: Axes, points: Points) -> None:
    """A line a group, with a bar at each point that stands for several jobs."""
    for name, group in points.groups.items():
        places = sorted(group)
        errors = list(zip(*(spread(group[place]) for place in places), strict=True)) if points.most > 1 else None
        means = [mean(group[place]) for place in places]
        axes.errorbar(places, means, yerr=errors, marker="o", capsize=3, label=str(name))
    if all(isinstance(place, int) for place in points.places):
        axes.xaxis.get_major_locator().set_params(integer=True)


def _bars(axes: Axes, points: Points) -> None:
    """At each place a bar a group, side by side."""
    places, width = points.places, 0.8 / len(points.groups)
    for index, (name, group) in enumerate(points.groups.items()):
        at = [places.index(place) + (index - (len(points.groups) - 1) / 2) * width for place in group]
        errors = list(zip(*map(spread, group.values()), strict=True)) if points.most > 1 else None
        axes.bar(at, list(map(mean, group.values())), width, yerr=errors, capsize=3, label=str(name))
    axes.set_xticks(range(len(places)), list(map(str, places)))
