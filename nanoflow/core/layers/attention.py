"""What stands between the QKV projection and the output projection."""

from __future__ import annotations

import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.data.batch import Projection
from nanoflow.core.layers.norm import RMSNorm
from nanoflow.core.layers.rotary import Rotation, apply_rotary


def attend(
    qkv_TE: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None, rotation: Rotation,
    attention: AttentionBackend, layer: int,
) -> torch.Tensor:  # fmt: skip
    """Norm and rotate queries and keys, store keys and values in the cache of `layer`, attend; returns [T, N, H].

    Args:
        qkv_TE: E = (N + 2K) * H: queries, keys and values.
        q_norm, k_norm: norms over each head; None for none. Two norms have one epsilon.
        rotation: of this batch.
        attention: planned for this batch.
        layer: whose cache.
    """
    if qkv_TE.is_cuda:
        q_weight, k_weight = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
        eps = next((norm.eps for norm in (q_norm, k_norm) if norm is not None), 0.0)
        projection = Projection(qkv_TE, q_weight, k_weight, eps, rotation.cos_LH, rotation.sin_LH, rotation.positions_T)
        out_TNH = attention.project_and_attend(layer, projection)
        if out_TNH is not None:
            return out_TNH
        from nanoflow.core.kernels import rotary

        query_TNH = rotary.norm_rotate_store(projection, attention.slot_mapping_T, *attention.cache(layer))
        return attention.attend(layer, query_TNH)
    num_kv_heads, head_dim = attention.cache(layer)[0].shape[2:]
    heads = qkv_TE.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], 1)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    attention.store(layer, apply_rotary(k, *rotation.angles), v)
    return attention.attend(layer, apply_rotary(q, *rotation.angles))
