"""Rotary position embedding (RoFormer, Su et al. 2021) in the half-split form of Hugging Face's models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.ops.attention import Rotation

# Those whose frequencies don't depend on a sequence's length, as far as the model has positions: "dynamic" stretches
# what lies beyond, which the engine refuses.
SCALED_ROPES = ("dynamic", "linear", "llama3", "yarn")


def rope_parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them, also from the older `rope_theta` and `rope_scaling`."""
    if parameters := hf_config.get("rope_parameters"):
        return {"rope_theta": 10000.0, "rope_type": "default"} | parameters
    scaling = hf_config.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": hf_config.get("rope_theta", 10000.0)} | scaling | {"rope_type": rope_type}


class RotaryEmbedding(nn.Module):
    """Tables of cosines and signed sines for every position below `max_model_len`, in float32.

    Raises:
        CheckpointError: a rope type that is not supported.
    """

    def __init__(self, context: ModelContext, head_dim: int) -> None:
        super().__init__()
        inv_freq, factor = _frequencies(context, head_dim)
        positions = torch.arange(context.max_model_len, dtype=torch.float32, device=context.device)
        angles = torch.outer(positions, inv_freq)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.register_buffer("cos_LH", torch.cat((cos, cos), -1), persistent=False)
        self.register_buffer("sin_LH", torch.cat((-sin, sin), -1), persistent=False)

    def forward(self, positions_T: torch.Tensor) -> Rotation:
        """The rotation of tokens at these positions."""
        return Rotation(self.cos_LH, self.sin_LH, positions_T)


def _frequencies(context: ModelContext, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [H / 2] and the factor on cosines and sines."""
    parameters = rope_parameters(context.hf_config)
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=context.device) / head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    if rope_type not in SCALED_ROPES:
        known = ", ".join(("default", *SCALED_ROPES))
        raise CheckpointError(f"The checkpoint's rope_type {rope_type!r} is not supported; supported are: {known}.")
    # Their formulas are many, run once, and are kept up to date by transformers.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = context.hf_config | {"rope_parameters": parameters, "head_dim": head_dim}
    config = SimpleNamespace(**settings, standardize_rope_params=lambda: None)
    return ROPE_INIT_FUNCTIONS[rope_type](config, context.device)
