"""What a measurement found out: as numbers for sweeps, as JSON, and as tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from nanoflow import __version__


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
class Report(ABC):
    """The outcome of a measurement on one engine.

    Attributes:
        description: checkpoint, the plugin of each role, device and dtype.
        columns: those of `numbers` that a sweep's table shows, with their titles.
    """

    columns: ClassVar[dict[str, str]]

    description: dict[str, str]

    @property
    @abstractmethod
    def headline(self) -> str:
        """The outcome in a few words."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """What can be compared between jobs, by the names that tables and files use."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """All that was measured, for a JSON file."""

    @abstractmethod
    def shown(self) -> Iterator[str | Table]:
        """Lines and tables to print."""

    def record(self) -> dict[str, Any]:
        """What was measured, and on what, for a JSON file."""
        return {"nanoflow": __version__, **self.description, **self.details()}


def rounded(value: float | None) -> float | None:
    """Three digits, or all those before the point."""
    if value is None or isinstance(value, int):
        return value
    return round(value) if abs(value) >= 100 else float(f"{value:.3g}")
