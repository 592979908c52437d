"""Weights: safetensors files -> parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.data.parallel import Shard
from nanoflow.core.loading.hub import read_json

INDEX = "model.safetensors.index.json"


def load_weights(folder: Path, targets: dict[str, torch.Tensor | Shard | None]) -> None:
    """Copy every tensor of the checkpoint, or the part that is wanted, into its target, straight from the mapped file.

    A checkpoint of the network without its head lacks the first part of all names, such as `model.`; it is put before
    them.

    Args:
        folder: holds one `*.safetensors` file, or several with an index.
        targets: as from `ModelArch.weights`; filled in place, converted to their dtype.

    Raises:
        CheckpointError: a file that is missing or corrupt, tensors that are missing, unknown or of a wrong shape.
    """
    missing = {name for name, target in targets.items() if target is not None}
    ((prefix, _),) = Counter(name.partition(".")[0] for name in targets).most_common(1) or [("", 0)]
    for file in _weight_files(folder):
        for name, stored in _stored_tensors(file):
            if name not in targets and f"{prefix}.{name}" in targets:
                name = f"{prefix}.{name}"
            if name not in targets and name.endswith(".rotary_emb.inv_freq"):
                continue  # old checkpoints hold it; it follows from the config
            if name not in targets:
                raise CheckpointError(f"{file} holds {name!r}, which the model has no place for.")
            target = targets[name]
            if target is None:
                continue
            whole = target.whole_shape if isinstance(target, Shard) else list(target.shape)
            if whole != stored.get_shape():
                raise CheckpointError(
                    f"{file}: {name!r} has shape {stored.get_shape()}, but config.json asks for {whole}."
                )
            if isinstance(target, Shard):
                target.target.copy_(stored[target.index])
            else:
                target.copy_(stored[:])
            missing.discard(name)
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise CheckpointError(
            f"The checkpoint in {folder} lacks {len(missing)} tensors that the model needs: {names}, ..."
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map; the checkpoint is incomplete.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file} is missing, though {INDEX} names it; copy the whole checkpoint.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"There are no *.safetensors files in {folder}; to run without weights set engine.load_format=dummy."
        )
    return files


def _stored_tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Names, and safetensors' slices, which read what they are indexed with."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); copy it again.") from error
