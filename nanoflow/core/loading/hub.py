"""Where a checkpoint lies: a bundled one, a folder or a Hub repository -> its folder and its JSON files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError, ConfigError, did_you_mean
from nanoflow.core.config.fields import is_int
from nanoflow.core.config.sampling_params import SamplingParams

ASSETS = Path(__file__).parents[2] / "assets"


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
    return read_json(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's generation_config.json; empty if it has none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    file = folder / "generation_config.json"
    return read_json(file) if file.exists() else {}


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


def read_json(file: Path) -> dict[str, Any]:
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
