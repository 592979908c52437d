"""What an engine did, and how fast: as numbers for sweeps, as JSON, and as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Figures in rows and columns, to be aligned by who prints them.

    Attributes:
        head: titles of the columns.
        rows: cells, None for an empty one.
    """

    head: tuple[str, ...]
    rows: list[tuple[object, ...]]


@dataclass(frozen=True)
class Report:
    """The outcome of a measurement, or of a run, on one engine.

    Attributes:
        description: checkpoint, the plugin of each role, device and dtype.
        headline: the outcome in a few words.
        columns: those of `numbers` that a sweep's table shows, with their titles.
        numbers: what can be compared between jobs, by the names that tables and files use.
        shown: lines and tables to print.
        record: the content of a JSON file.
    """

    description: dict[str, str]
    headline: str
    columns: dict[str, str]
    numbers: dict[str, Any]
    shown: list[str | Table]
    record: dict[str, Any] = field(default_factory=dict)


def rounded(value: float | None) -> float | None:
    """Three digits, or all those before the point."""
    if value is None or isinstance(value, int):
        return value
    return round(value) if abs(value) >= 100 else float(f"{value:.3g}")
