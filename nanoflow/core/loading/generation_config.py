"""A checkpoint's generation_config.json: how its authors want tokens to be sampled, and where an output ends."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError, ConfigError
from nanoflow.core.config.fields import is_int
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.loading.json_files import read_json

# Keys of generation_config.json, and the sampling parameters that they are the defaults of.
GENERATION_KEYS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}


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
