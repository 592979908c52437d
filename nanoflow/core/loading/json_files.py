"""JSON files of a checkpoint, read in bounded time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.config.files import check_is_file

MOST_BYTES = 64 * 2**20  # the index of a model of 10,000 tensors has 1 MB


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, not a regular one, too large, or holds something else.
    """
    check_is_file(file)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{file} has over {MOST_BYTES:,} bytes, more than any such file needs; copy it again."
            )
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{file} can't be read as JSON (it is nested too deeply).") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return value
