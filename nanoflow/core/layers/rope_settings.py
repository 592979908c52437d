"""Rotary settings of config.json, merged as transformers 5 does it, and the frequencies that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from nanoflow.core.config.errors import CheckpointError, one_line, shown
from nanoflow.core.config.fields import is_number

# Those whose frequencies don't depend on a sequence's length, as far as the model has positions: "dynamic" stretches
# what lies beyond, which the engine refuses. For each, what it needs to be told.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
    "yarn": ("factor",),
}
HAVE_ORIGINAL_LENGTH = ("llama3", "yarn")
STRETCHED = ("linear", "yarn")
POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
NUMBERS = (*POSITIVE, "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
DEFAULT_THETA = 10000.0


def rope_parameters(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as `rope_parameters` of transformers 5.

    Those of `rope_scaling` (older versions) go before those of `rope_parameters`, and within either of them is what
    counts; `rope_theta` and `partial_rotary_factor` of config.json itself are for what isn't said there. null counts as
    left out, but for YaRN's `factor`.

    Raises:
        CheckpointError: they are no object, or hold something else than numbers where numbers belong.
    """
    for key in ("rope_scaling", "rope_parameters"):
        said = hf_config.get(key)
        if said is not None and not isinstance(said, dict):
            raise CheckpointError(f"The checkpoint's config.json has {key}={shown(said):.60}, which is no JSON object.")
    said = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    parameters = {key: value for key, value in said.items() if value is not None or key == "factor"}
    for key, default in (("rope_theta", DEFAULT_THETA), ("partial_rotary_factor", None)):
        value = hf_config.get(key)
        if (value := default if value is None else value) is not None:
            parameters.setdefault(key, value)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters["rope_type"] in HAVE_ORIGINAL_LENGTH:
        key = "original_max_position_embeddings"
        if hf_config.get(key) is not None:
            parameters[key] = hf_config[key]
        parameters.setdefault(key, hf_config.get("max_position_embeddings"))
    for key in NUMBERS:
        value = parameters.get(key)
        if value is not None and not (is_number(value) and (value > 0 or key not in POSITIVE)):
            wanted = "a number > 0" if key in POSITIVE else "a number"
            raise CheckpointError(f"The rope settings of config.json: {key} must be {wanted}, got {shown(value):.60}.")
    return parameters


def stretched_length(hf_config: Mapping[str, Any], length: int) -> int:
    """How many tokens a sequence may have, given that the model has `length` positions.

    Scaling makes room for `factor` times as many: of the original ones with YaRN, of `length` with linear scaling.

    Raises:
        CheckpointError: as `rope_parameters`.
    """
    parameters = rope_parameters(hf_config)
    if parameters["rope_type"] not in STRETCHED:
        return length
    factor = parameters.get("factor") or 1.0
    return max(length, int(factor * parameters.get("original_max_position_embeddings", length)))


def inverse_frequencies(
    hf_config: Mapping[str, Any], head_dim: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] in float32, and the factor on cosines and sines.

    Raises:
        CheckpointError: settings that are incomplete or not supported.
    """
    parameters = rope_parameters(hf_config)
    rope_type = parameters["rope_type"]
    if any(isinstance(value, dict) for value in parameters.values()):
        raise CheckpointError("The rope settings of config.json differ by kinds of layers, which is not supported.")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"The checkpoint's rope_type {shown(rope_type):.60} is not supported; supported are: "
            f"{', '.join(ROPE_TYPES)}."
        )
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    for key in ROPE_TYPES[rope_type]:
        if key not in parameters or (parameters[key] is None and rope_type != "yarn"):
            raise CheckpointError(f"The rope settings of config.json lack {key!r}, which {rope_type!r} rotation needs.")
    share = parameters.get("partial_rotary_factor", 1.0)
    if rope_type != "proportional" and int(head_dim * share) != head_dim:
        raise CheckpointError(
            f"The rope settings of config.json rotate a part of each head (partial_rotary_factor {share}), which "
            f"rope_type {rope_type!r} is not supported with."
        )
    return _scaled(hf_config, parameters, head_dim, device)


def _scaled(
    hf_config: Mapping[str, Any], parameters: dict[str, Any], head_dim: int, device: torch.device | str | None
) -> tuple[torch.Tensor, float]:
    # Their formulas are many, run once, and are kept up to date by transformers.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": head_dim, "num_attention_heads": 1}  # are looked up, but head_dim is what counts
    settings = {**sizes, **hf_config, "rope_parameters": parameters, "head_dim": head_dim}
    config = SimpleNamespace(**settings, standardize_rope_params=lambda: None)
    try:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device)
        if inv_freq.shape != (head_dim // 2,) or not bool(inv_freq.isfinite().all()):
            raise ArithmeticError("the frequencies are no finite numbers")
    except Exception as error:
        raise CheckpointError(
            f"The rope settings of config.json, of type {parameters['rope_type']!r}, can't be used "
            f"({one_line(error):.120})."
        ) from error
    return inv_freq, factor
