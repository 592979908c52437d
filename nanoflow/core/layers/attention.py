"""What stands between the QKV projection and the output projection."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.data.attention_input import Projection
from nanoflow.core.layers.norm import RMSNorm
from nanoflow.core.ops import Ops
from nanoflow.core.ops.attention import Rotation


def attend(
    ops: Ops, qkv_TE: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None, rotation: Rotation,
    attention: AttentionBackend, layer: int,
) -> torch.Tensor:  # fmt: skip
    """Norm and rotate queries and keys, store keys and values in the cache of `layer`, attend; returns [T, N, H].

    Args:
        ops: to do it with.
        qkv_TE: E = (N + 2K) * H: queries, keys and values.
        q_norm, k_norm: norms over each head; None for none. Two norms have one epsilon.
        rotation: of this batch.
        attention: planned for this batch.
        layer: whose cache.
    """
    q_weight, k_weight = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
    eps = next((norm.eps for norm in (q_norm, k_norm) if norm is not None), 0.0)
    projection = Projection(qkv_TE, q_weight, k_weight, eps, rotation.cos_LH, rotation.sin_LH, rotation.positions_T)
    if (out_TNH := attention.project_and_attend(layer, projection)) is not None:
        return out_TNH
    keys_BPKH, values_BPKH = attention.cache(layer)
    query_TNH = ops.norm_rotate_store(projection, attention.slot_mapping_T, keys_BPKH, values_BPKH)
    if query_TNH is None:
        query_TNH, key_TKH, value_TKH = ops.norm_rotate(projection, rotation, keys_BPKH.shape[2])
        attention.store(layer, key_TKH, value_TKH)
    return attention.attend(layer, query_TNH)
