"""Checkpoints: a folder or a Hub id -> a local folder -> config, and safetensors -> parameters."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanoflow.core.config import SamplingParams, is_int
from nanoflow.core.errors import CheckpointError, ConfigError, did_you_mean
from nanoflow.core.parallel import Shard

ASSETS = Path(__file__).parent.parent / "assets"
INDEX = "model.safetensors.index.json"
# Keys of generation_config.json, and the sampling parameters that they are the defaults of.
GENERATION_KEYS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve(name: str) -> Path:
    """The local folder of a checkpoint: a bundled one, a folder, or a Hub repository (downloaded, or from its cache).

    Some bundled ones, such as `qwen3-8b`, are a config.json alone, for random weights.

    Raises:
        CheckpointError: no such folder, and no such repository that can be reached.
    """
    if name in (folders := bundled()):
        return folders[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"Checkpoint {name!r} is a file; name the folder that it lies in.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except HFValidationError:
        raise CheckpointError(
            f"Checkpoint {name!r} does not exist: there is no such folder, and it is no Hub id."
            f"{did_you_mean(name, folders)}"
        ) from None
    except Exception as error:  # the Hub's client lets many kinds through, its transport's among them
        raise CheckpointError(
            f"Checkpoint {name!r} is not a folder here and could not be had from the Hub "
            f"({type(error).__name__}); check the name, the network, or HF_HUB_OFFLINE."
            f"{did_you_mean(name, folders)}"
        ) from error


def bundled() -> dict[str, Path]:
    """The checkpoints that come with the package: their folders by name."""
    return {file.parent.name: file.parent for file in ASSETS.rglob("config.json")}


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    return _read_json(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's generation_config.json; empty if it has none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    file = folder / "generation_config.json"
    return _read_json(file) if file.exists() else {}


def sampling_params(folder: Path) -> SamplingParams:
    """How the checkpoint's generation_config.json wants tokens to be sampled; what it doesn't say is as always.

    Raises:
        CheckpointError: it says what can't be.
    """
    said = read_generation_config(folder)
    values = {name: said[key] for key, name in GENERATION_KEYS.items() if said.get(key) is not None}
    try:
        return SamplingParams(**values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from error


def eos_token_ids(folder: Path, hf_config: dict[str, Any], vocab_size: int, of_tokenizer: Any = None) -> frozenset[int]:
    """End-of-sequence ids by config.json, generation_config.json and the tokenizer, if it has one.

    What can't be generated is left out with a warning: it is no integer, or not below the model's `vocab_size`.
    """
    said: list[Any] = []
    for value in (hf_config.get("eos_token_id"), read_generation_config(folder).get("eos_token_id"), of_tokenizer):
        said += value if isinstance(value, list) else [value]
    ids = [value for value in said if value is not None]
    known = frozenset(value for value in ids if is_int(value) and 0 <= value < vocab_size)
    strange = [value for value in ids if not is_int(value) or value not in known]
    if strange:
        warnings.warn(
            f"The end-of-sequence id {strange[0]!r:.40} of {folder} is left out, for the model's ids are integers from "
            f"0 to {vocab_size - 1}.",
            stacklevel=2,
        )
    return known


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


def fill_random(targets: dict[str, torch.Tensor | Shard | None], seed: int) -> None:
    """Random weights for `load_format=dummy`: norms 1, biases 0, the rest normal with deviation 0.02.

    They don't depend on how many ranks share them.
    """
    for index, (name, target) in enumerate(targets.items()):
        if target is None:
            continue
        part = target.target if isinstance(target, Shard) else target
        if part.dim() == 1:
            part.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        whole = part.new_empty(target.whole_shape) if isinstance(target, Shard) else part
        generator = torch.Generator(part.device).manual_seed((seed + index) % 2**63)
        whole.normal_(0.0, 0.02, generator=generator)
        if isinstance(target, Shard):
            part.copy_(whole[target.index])


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing; a checkpoint is a folder with config.json and safetensors."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return value
