"""Files that may be opened: regular ones, and no stand-ins for others."""

from __future__ import annotations

from pathlib import Path

from nanoflow.core.config.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_is_file(file: Path) -> None:
    """Refuse what must not be opened (a pipe or a device may never end) and what only stands for a file.

    Raises:
        CheckpointError: the file is missing, not a regular one, or a pointer of Git LFS.
    """
    try:
        if not file.is_file():
            there = file.exists() or file.is_symlink()
            raise CheckpointError(f"{file} is {'no regular file' if there else 'missing'}; copy the whole checkpoint.")
        with file.open("rb") as stream:
            beginning = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read ({error.strerror}).") from error
    if beginning == LFS_POINTER:
        raise CheckpointError(f"{file} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull.")
