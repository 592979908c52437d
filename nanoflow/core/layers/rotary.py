"""Rotary position embedding (RoFormer, Su et al. 2021) in the half-split form of Hugging Face's models."""

from __future__ import annotations

import torch
from torch import nn

from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers.rope_settings import inverse_frequencies
from nanoflow.core.ops.attention import Rotation


class RotaryEmbedding(nn.Module):
    """Tables of cosines and signed sines for every position below `max_model_len`, in float32.

    Raises:
        CheckpointError: rope settings that are not supported.
    """

    def __init__(self, context: ModelContext, head_dim: int) -> None:
        super().__init__()
        inv_freq, factor = inverse_frequencies(context.hf_config, head_dim, context.device)
        positions = torch.arange(context.max_model_len, dtype=torch.float32, device=context.device)
        angles = torch.outer(positions, inv_freq)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.register_buffer("cos_LH", torch.cat((cos, cos), -1), persistent=False)
        self.register_buffer("sin_LH", torch.cat((-sin, sin), -1), persistent=False)

    def forward(self, positions_T: torch.Tensor) -> Rotation:
        """The rotation of tokens at these positions."""
        return Rotation(self.cos_LH, self.sin_LH, positions_T)
