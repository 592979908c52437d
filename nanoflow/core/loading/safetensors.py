"""Weights: safetensors files -> parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.data.parallel import Shard
from nanoflow.core.loading.weight_files import weight_files
from nanoflow.core.loading.weight_names import EMBEDDINGS, HEAD, is_needless, match, no_place

FLOATS = ("F64", "F32", "F16", "BF16")
ROWS = 4096  # of two tables that are compared at a time


def load_weights(folder: Path, targets: dict[str, torch.Tensor | Shard | None]) -> None:
    """Copy every tensor of the checkpoint, or the part that is wanted, into its target, straight from the mapped file.

    What the files are is checked before the first tensor is read.

    Args:
        folder: holds a checkpoint; see `weight_files` and `weight_names` for which files and names.
        targets: as from `ModelArch.weights`; filled in place, converted to their dtype.

    Raises:
        CheckpointError: a file that is missing or corrupt, tensors that are missing, unknown, of a wrong shape, or
            neither float16, bfloat16, float32 nor float64.
    """
    with _opened(folder) as tensors:
        where = folder if len({file for file, _ in tensors.values()}) > 1 else next(iter(tensors.values()))[0]
        found, left_over = match(tensors, targets, str(where))
        _check_left_over(left_over, tensors)
        for name, target in found.items():
            _check(name, *tensors[name], targets[target])
        missing = {name for name, target in targets.items() if target is not None} - set(found.values())
        if missing:
            names = ", ".join(sorted(missing)[:3])
            raise CheckpointError(
                f"The checkpoint in {folder} lacks {len(missing)} tensors that the model needs: {names}, ..."
            )
        for name, target in found.items():
            _copy(tensors[name], targets[target])


def has_own_head(folder: Path) -> bool:
    """Whether a checkpoint holds an output head that is unlike its token embedding, so that the two can't be tied.

    Raises:
        CheckpointError: there are no weights that can be read.
    """
    with _opened(folder) as tensors:
        heads = [name for name in tensors if name.endswith(HEAD)]
        tables = [name for name in tensors if name.endswith(EMBEDDINGS)]
        if len(heads) != 1 or len(tables) != 1:
            return False
        (head_file, head), (table_file, table) = tensors[heads[0]], tensors[tables[0]]
        if head.get_shape() != table.get_shape() or len(head.get_shape()) != 2:
            return head.get_shape() != table.get_shape()
        with _readable(head_file), _readable(table_file):
            starts = range(0, head.get_shape()[0], ROWS)
            return not all(_equal(head[start : start + ROWS], table[start : start + ROWS]) for start in starts)


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, tuple[Path, Any]]]:
    """The checkpoint's tensors by name: their file, and safetensors' slice, which reads what it is indexed with."""
    from safetensors import safe_open

    tensors: dict[str, tuple[Path, Any]] = {}
    with ExitStack() as stack:
        for file in weight_files(folder):
            with _readable(file):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                tensors |= {name: (file, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        if not tensors:
            raise CheckpointError(f"The checkpoint in {folder} holds no tensors; copy it again.")
        yield tensors


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); copy it again.") from error


def _check(name: str, file: Path, stored: Any, target: torch.Tensor | Shard | None) -> None:
    if target is None:
        return
    whole = target.whole_shape if isinstance(target, Shard) else list(target.shape)
    if whole != stored.get_shape():
        raise CheckpointError(f"{file}: {name!r} has shape {stored.get_shape()}, but config.json asks for {whole}.")
    if stored.get_dtype() not in FLOATS:
        raise CheckpointError(
            f"{file}: {name!r} is in {stored.get_dtype()}, as in quantized checkpoints, which are not served; use the "
            "original checkpoint, in bfloat16 or float16."
        )


def _check_left_over(names: list[str], tensors: dict[str, tuple[Path, Any]]) -> None:
    """Tensors without a place: a bias matters unless it is all zeros; what another task needs is worth a warning."""
    for name in names:
        file, stored = tensors[name]
        if is_needless(name):
            continue
        with _readable(file):
            if stored[:].any():
                raise no_place(name, str(file))
    heads = sorted({name.partition(".")[0] for name in names if is_needless(name) and "rotary_emb" not in name})
    if heads:
        warnings.warn(
            f"Tensors of the checkpoint that generating text has no use for are passed over: {', '.join(heads)}.",
            stacklevel=4,
        )


def _copy(tensor: tuple[Path, Any], target: torch.Tensor | Shard | None) -> None:
    file, stored = tensor
    with _readable(file):
        if isinstance(target, Shard):
            target.target.copy_(stored[target.index])
        elif target is not None:
            target.copy_(stored[:])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())
