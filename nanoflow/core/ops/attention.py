"""Between the QKV projection and attention: norms of heads, rotation, and the way into the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nanoflow.core.data.attention_input import Projection
from nanoflow.core.ops.norm import rms_norm


@dataclass
class Rotation:
    """The rotation of a step's tokens: kernels read the tables at the positions, PyTorch the angles of each token.

    Attributes:
        cos_LH, sin_LH, positions_T: as in `Projection`.
    """

    cos_LH: torch.Tensor
    sin_LH: torch.Tensor
    positions_T: torch.Tensor

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, 1, H]; one look-up serves all layers."""
        return self.cos_LH[self.positions_T].unsqueeze(1), self.sin_LH[self.positions_T].unsqueeze(1)


def apply_rotary(x_TNH: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its token's angles; computed in float32, returned in x's dtype."""
    half = x_TNH.shape[-1] // 2
    rotated = torch.addcmul(x_TNH * cos_T1H, x_TNH.roll(half, -1), sin_T1H)
    return rotated.to(x_TNH.dtype)


def norm_rotate(
    projection: Projection, rotation: Rotation, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, N, H], keys and values [T, K, H]; queries and keys are normed where they have a norm, then rotated.

    Args:
        projection: what the QKV projection gave; its tables and positions are those of `rotation`.
        rotation: of this step.
        num_kv_heads: K.
    """
    p, head_dim = projection, projection.cos_LH.shape[1]
    heads_TNH = p.qkv_TE.unflatten(-1, (-1, head_dim))
    q, k, v = heads_TNH.split([heads_TNH.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], 1)
    q = q if p.q_weight_H is None else rms_norm(q, p.q_weight_H, p.eps)
    k = k if p.k_weight_H is None else rms_norm(k, p.k_weight_H, p.eps)
    return apply_rotary(q, *rotation.angles), apply_rotary(k, *rotation.angles), v


def norm_rotate_store(
    projection: Projection, slots_T: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
) -> torch.Tensor | None:
    """`norm_rotate`, and keys and values stored in the cache; returns the queries [T, N, H].

    None: nothing was done, make two operations of it (`norm_rotate`, and the attention backend's `store`).

    Args:
        projection: what the QKV projection gave, and what to do with it.
        slots_T: int64; block * P + place. A negative one stores nothing.
        key_BPKH, value_BPKH: views of a layer's cache with any strides but the last, which is 1.
    """
    return None
