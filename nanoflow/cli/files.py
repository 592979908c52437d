"""Files that a command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import ConfigError


def output_file(key: str, name: str | None, folder: Path) -> Path | None:
    """Where the setting `key`, a file's name under `folder`, lets its file be written; None if it is not set.

    Raises:
        ConfigError: no file can be written there.
    """
    path = folder / Path(name).expanduser() if name else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{key} {path} can't be written: it must be a file in a folder that exists.")
    return path


def write_json(key: str, path: Path, record: dict[str, Any]) -> None:
    """Write the file of the setting `key`.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key} {path} can't be written: {error.strerror}.") from error
