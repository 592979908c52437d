"""What the jobs of a sweep found out, as a table, sorted by a column, and as CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.cli import show
from nanoflow.cli.results import jobs
from nanoflow.core.config.errors import ConfigError, did_you_mean

ERROR = "error"  # the last one, where there is something to say
FIRST_COLUMNS = ("job", "overrides", "status")


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
        records = [jobs.read(place) for place in jobs.folders(folder)]
        if not records:
            raise ConfigError(f"{folder} is not the folder of a sweep: it holds no */{jobs.RESULT}.")
        titles = {key: key for key in FIRST_COLUMNS}
        records.sort(key=lambda record: record["job"])
        for record in records:
            titles |= record.pop("columns", {})
        return cls(records, titles)

    def columns(self) -> list[str]:
        """All there are."""
        return list(dict.fromkeys(key for record in self.jobs for key in with_overrides(record)))

    def sorted(self, column: str, reverse: bool = False) -> Results:
        """By a column, the least first or the greatest; jobs without a value come last.

        Raises:
            ConfigError: there is no such column.
        """
        self.require(column)
        having = [record for record in self.jobs if with_overrides(record).get(column) is not None]
        having.sort(key=lambda record: _order(with_overrides(record)[column]), reverse=reverse)
        extra = {} if column in self.titles or column not in having[0] else {column: column}
        return Results(having + [r for r in self.jobs if r not in having], self.titles | extra)

    def table(self) -> str:
        """A line a job, with the reason why it failed; what all jobs have been told is left out."""
        told = [set(record["overrides"]) for record in self.jobs]
        shared = set.intersection(*told) if len(told) > 1 else set()
        rows = [
            {**record, "overrides": " ".join(item for item in record["overrides"] if item not in shared)}
            for record in self.jobs
        ]
        titles = self.titles | ({ERROR: ERROR} if any(row.get(ERROR) for row in rows) else {})
        rows = [{**row, ERROR: " ".join(str(row.get(ERROR) or "").split())} for row in rows]
        return show.table(list(titles.values()), ([row.get(key) for key in titles] for row in rows))

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

    def require(self, *columns: str) -> None:
        """Raise unless all of these columns are there.

        Raises:
            ConfigError: one is not.
        """
        known = self.columns()
        for column in columns:
            if column not in known:
                meant = did_you_mean(column, known) or f" There are: {known}."
                raise ConfigError(f"There is no column {column!r}.{meant}")


def with_overrides(record: dict[str, Any]) -> dict[str, Any]:
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
