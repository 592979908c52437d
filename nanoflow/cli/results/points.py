"""What a plot shows of a sweep's jobs: one point for all that share its place, with their mean and their spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nanoflow.cli.results.table import Results, with_overrides
from nanoflow.core.config.errors import ConfigError

UNITS = {
    "_tokens_per_s": "tok/s", "_tok_per_s": "tok/s", "_gb_per_s": "GB/s", "_ms": "ms", "_percent": "%", "_gib": "GiB",
    "seconds": "s",
}  # fmt: skip  # by the ends of columns' names


@dataclass(frozen=True)
class Points:
    """The points of a plot.

    Attributes:
        groups: values of y by x, of each line or colour of bars.
        differs: the settings in which jobs of one point differ; empty if every point is one job.
        most: jobs in the point that has most.
    """

    groups: dict[Any, dict[Any, list[float]]]
    differs: list[str]
    most: int

    @classmethod
    def of(cls, results: Results, x: str, y: str, by: str | None) -> Points:
        """`y` over `x`, a group for each value of `by`.

        Raises:
            ConfigError: no such column, or no numbers to plot.
        """
        results.require(x, y, *([by] if by else []))
        rows = [row for row in map(with_overrides, results.jobs) if None not in (row.get(x), row.get(y))]
        if not rows or not all(isinstance(row[y], int | float) for row in rows):
            raise ConfigError(f"The column {y!r} holds no numbers to plot; choose another one for y.")
        jobs: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for row in rows:
            jobs.setdefault((row.get(by) if by else y, row[x]), []).append(row)
        groups: dict[Any, dict[Any, list[float]]] = {}
        for (label, place), shared in jobs.items():
            groups.setdefault(label, {})[place] = [row[y] for row in shared]
        differs = {name: None for shared in jobs.values() for name in _differing(shared)}
        return cls(groups, list(differs), max(map(len, jobs.values())))

    @property
    def places(self) -> list[Any]:
        """All values of x, in the order of the jobs."""
        return list(dict.fromkeys(place for points in self.groups.values() for place in points))

    @property
    def values(self) -> Iterable[float]:
        """All values of y."""
        return (value for points in self.groups.values() for values in points.values() for value in values)

    @property
    def note(self) -> str | None:
        """What a point stands for, if not for one job."""
        if self.most == 1:
            return None
        what = f" that differ in {', '.join(self.differs)}" if self.differs else " with the same settings"
        return f"points are means of up to {self.most} jobs{what}; bars go from the least to the greatest"


def mean(values: list[float]) -> float:
    """The mean of the jobs of a point."""
    return fmean(values)


def spread(values: list[float]) -> tuple[float, float]:
    """How far the least and the greatest are from the mean."""
    return mean(values) - min(values), max(values) - mean(values)


def label(results: Results, column: str) -> str:
    """A column's name with its unit, such as `TTFT (ms)`."""
    title = results.titles.get(column)
    end, unit = next(((end, unit) for end, unit in UNITS.items() if column.endswith(end)), ("", ""))
    if title is not None and not (unit and title.endswith(unit)):
        return title
    name = title.removesuffix(unit).strip() if title is not None else column.removesuffix(end).replace("_", " ").strip()
    if "." in column:
        name = column  # a setting goes by its name
    return f"{name or column} ({unit})" if unit else name


def _differing(rows: list[dict[str, Any]]) -> list[str]:
    """The settings, as told by overrides, in which jobs differ."""
    told = [{item.partition("=")[0].lstrip("+~"): item for item in row["overrides"]} for row in rows]
    names = dict.fromkeys(name for settings in told for name in settings)
    return [name for name in names if len({settings.get(name) for settings in told}) > 1]
