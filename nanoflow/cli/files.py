"""Files that a command writes."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import ConfigError


def output_file(key: str, name: str | None, folder: Path) -> Path | None:
    """Where the setting `key`, a file's name under `folder`, lets its file be written; None if it is not set.

    Raises:
        ConfigError: no file can be written there.
    """
    if not name:
        return None
    path = folder / Path(name).expanduser()
    try:
        ready = path.parent.is_dir() and _is_file_or_nothing(path)
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL in it
        raise ConfigError(f"{key} {str(path)!r:.60} is no name that a file can have.") from error
    if not ready:
        raise ConfigError(f"{key} {path} can't be written: it must be a file in a folder that exists.")
    return path


def _is_file_or_nothing(path: Path) -> bool:
    """Whether a file may be written there: no folder, and no device, which may be read without end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True


def write_json(key: str, path: Path, record: dict[str, Any]) -> None:
    """Write the file of the setting `key`.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key} {path} can't be written: {error.strerror}.") from error
