"""The record that each job of a sweep leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OK, FAILED, INTERRUPTED = "ok", "failed", "interrupted"
RESULT = "result.json"


def begin(folder: Path, number: int, overrides: list[str]) -> None:
    """The record of a job that has begun; as long as it says no more, the job was interrupted."""
    _write(folder, {"job": number, "overrides": overrides, "status": INTERRUPTED, "error": ""})


def succeed(folder: Path, columns: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """The record of a job that went well, with the columns that a table shows and all that was found."""
    return _write(folder, read(folder) | {"status": OK, "columns": columns, **found})


def fail(folder: Path, error: str) -> dict[str, Any]:
    """The record of a job that failed."""
    return _write(folder, read(folder) | {"status": FAILED, "error": error})


def read(folder: Path) -> dict[str, Any]:
    """The record that a job left in its folder."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def folders(sweep: Path) -> list[Path]:
    """Those of the jobs in a sweep's folder that have begun."""
    return [path.parent for path in sweep.glob(f"*/{RESULT}")]


def last_change(sweep: Path) -> float:
    """When the record of a job of a sweep was last written, in seconds since the epoch."""
    return max((folder / RESULT).stat().st_mtime for folder in folders(sweep))


def _write(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / RESULT).write_text(text + "\n", encoding="utf-8")
    return record
