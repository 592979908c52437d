"""What several commands print: warnings, reports, tables. Colour goes to terminals only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from nanoflow.bench.report import Report, Table
from nanoflow.core.registry.roles import ROLES, in_config

BOLD, DIM, YELLOW = "1", "2", "33"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` with an ANSI style, or plain if `stream` (standard output) is no terminal or NO_COLOR is set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"\033[{style}m{text}\033[0m"


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"{styled('nanoflow: warning:', YELLOW, sys.stderr)} {message}", file=sys.stderr)


def engine(description: dict[str, str]) -> None:
    """Print what ran: checkpoint, plugins, device and dtype."""
    roles = " ".join(f"{role}={description[role]}" for role in in_config(ROLES) if description.get(role))
    print(styled(f"{description['checkpoint']} | {roles} | {description['device']} {description['dtype']}", DIM))


def report(report: Report) -> None:
    """Print what ran, and what came out of it."""
    engine(report.description)
    for part in report.shown:
        print(table(part.head, part.rows) if isinstance(part, Table) else part)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of aligned columns: those of numbers to the right, the rest to the left."""
    columns = [[title, *values] for title, *values in zip(head, *rows, strict=True)]
    return "\n".join(" | ".join(cells).rstrip() for cells in zip(*map(_aligned, columns), strict=True))


def _aligned(column: list[object]) -> list[str]:
    title, *values = ("" if value is None else str(value) for value in column)
    width = max(map(len, (title, *values)))
    align = str.rjust if any(isinstance(value, int | float) for value in column) else str.ljust
    return [align(title, width), "-" * width, *(align(value, width) for value in values)]
