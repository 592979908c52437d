"""Which files of a folder hold a checkpoint's weights: those that transformers reads, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nanoflow.core.config.errors import CheckpointError, shown
from nanoflow.core.config.files import check_is_file
from nanoflow.core.loading.foreign_formats import why_no_weights
from nanoflow.core.loading.json_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED_BY = "transformers_weights"  # a key of config.json
LONGEST_NAME = 255


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights; where several hold a tensor, the last one counts.

    It is the one that config.json names in `transformers_weights`, else model.safetensors, else those of the index.

    Raises:
        CheckpointError: there are none, or one is missing, not a regular file or out of the folder.
    """
    names = names_of_weights(folder)
    for name in names:
        if not _is_file(folder / name):
            continue
        files = shards(folder / name) if name.endswith(".json") else [name]
        for file in files:
            if file != name and not _is_there(folder / file):
                raise CheckpointError(f"{folder / file} is missing, though {name} names it; copy the whole checkpoint.")
            check_is_file(folder / file)
        return [folder / file for file in files]
    if len(names) == 1 or _is_there(folder / SINGLE):
        check_is_file(folder / names[0])  # which it isn't
    raise CheckpointError(why_no_weights(str(folder), (file.name for file in folder.iterdir())))


def names_of_weights(folder: Path) -> list[str]:
    """Of the file that holds the weights, or of the index of those that do; the first one that is there counts.

    Raises:
        CheckpointError: config.json names one that can't be.
    """
    config = read_json(folder / "config.json") if _is_there(folder / "config.json") else {}
    name = config.get(NAMED_BY)
    if name is None:
        return [SINGLE, INDEX]
    _check_name(folder / "config.json", name)
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{folder / 'config.json'}: {NAMED_BY} is {name!r:.60}, which is no safetensors file.")
    return [name]


def shards(index: Path) -> list[str]:
    """The files that an index names, in the order in which they are read.

    Raises:
        CheckpointError: it has no map from tensors to files in its own folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; the checkpoint is incomplete.")
    for name in weight_map.values():
        _check_name(index, name)
    return sorted(set(weight_map.values()))


def _check_name(file: Path, name: Any) -> None:
    """Refuse what doesn't name a file in the folder of `file`, or below."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{file} names {shown(name):.60} where the name of a safetensors file belongs.")
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in kinds):
        raise CheckpointError(f"{file} names {name!r:.60}, which lies out of the checkpoint's folder.")
    if max(map(len, name.encode("utf-8", "replace").split(b"/"))) > LONGEST_NAME:
        raise CheckpointError(f"{file} names a file of {len(name)} letters, {name!r:.30}..., which is too long.")


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:
        return False


def _is_there(file: Path) -> bool:
    try:
        return file.is_symlink() or file.exists()
    except OSError:
        return False
