"""From the fused QKV projection to what attention wants: normed and rotated queries, keys and values in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.data.attention_input import Projection
from nanoflow.core.kernels.pdl import pdl_launch, pdl_options, pdl_wait


def norm_rotate_store(
    projection: Projection, slots_T: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor
) -> torch.Tensor:
    """Norm each query and key head (if it has a weight), rotate it, store keys and values at `slots_T`.

    Args:
        projection: queries, keys and values, and what to do with them.
        slots_T: int64; block * P + place. A negative one stores nothing.
        key_BPKH, value_BPKH: views of the cache with any strides but the last, which is 1.

    Returns:
        The queries [T, N, H].
    """
    p, qkv_TE = projection, projection.qkv_TE
    num_tokens = qkv_TE.shape[0]
    block_size, num_kv_heads, head_dim = key_BPKH.shape[1:]
    all_heads = qkv_TE.shape[1] // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    query_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TE.dtype, device=qkv_TE.device)
    if num_tokens == 0:
        return query_TNH
    # What was fastest on an H100 in steps of 32 to 256 rows, and for 8,192.
    heads, num_warps = (2, 1) if num_tokens <= 64 else (8, 4) if num_tokens <= 1024 else (32, 1)
    _norm_rotate_store[(num_tokens, triton.cdiv(all_heads, heads))](
        qkv_TE, p.q_weight_H, p.k_weight_H, p.cos_LH, p.sin_LH, p.positions_T, slots_T, query_TNH, key_BPKH, value_BPKH,
        p.eps, qkv_TE.stride(0), p.cos_LH.stride(0), *key_BPKH.stride()[:3], *value_BPKH.stride()[:3],
        N=num_heads, K=num_kv_heads, H=head_dim, P=block_size, Q_NORM=p.q_weight_H is not None,
        K_NORM=p.k_weight_H is not None, HEADS=heads, HALF=triton.next_power_of_2(head_dim // 2), num_warps=num_warps,
        **pdl_options(qkv_TE),
    )  # fmt: skip
    return query_TNH


@triton.jit
def _norm_rotate_store(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, query_ptr, key_ptr, value_ptr, eps,
    qkv_stride, table_stride, key_block, key_place, key_head, value_block, value_place, value_head,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    left = tl.arange(0, HALF)[None, :]
    right = left + H // 2
    inside = left < H // 2
    is_query, is_key, is_value = head < N, (head >= N) & (head < N + K), (head >= N + K) & (head < N + 2 * K)
    pdl_launch(PDL)
    # Ready since the start of the step.
    slot = tl.load(slots_ptr + token).to(tl.int64)
    table = tl.load(positions_ptr + token).to(tl.int64) * table_stride
    cos_left = tl.load(cos_ptr + table + left, mask=inside, other=0.0)
    cos_right = tl.load(cos_ptr + table + right, mask=inside, other=0.0)
    sin_left = tl.load(sin_ptr + table + left, mask=inside, other=0.0)
    sin_right = tl.load(sin_ptr + table + right, mask=inside, other=0.0)
    weight_left, weight_right = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    if Q_NORM:
        weight_left = tl.where(is_query, tl.load(q_weight_ptr + left, mask=inside, other=0.0).to(tl.float32), 0.0)
        weight_right = tl.where(is_query, tl.load(q_weight_ptr + right, mask=inside, other=0.0).to(tl.float32), 0.0)
    if K_NORM:
        key_left = tl.load(k_weight_ptr + left, mask=inside, other=0.0).to(tl.float32)
        key_right = tl.load(k_weight_ptr + right, mask=inside, other=0.0).to(tl.float32)
        weight_left = tl.where(is_key, key_left, weight_left)
        weight_right = tl.where(is_key, key_right, weight_right)
    pdl_wait(PDL)
    row = qkv_ptr + token * qkv_stride + head * H
    exists = inside & (head < N + 2 * K)
    raw_left, raw_right = tl.load(row + left, mask=exists, other=0.0), tl.load(row + right, mask=exists, other=0.0)
    x, y = raw_left.to(tl.float32), raw_right.to(tl.float32)
    if Q_NORM or K_NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / H + eps)[:, None]
        has_norm = (is_query & Q_NORM) | (is_key & K_NORM)
        x = tl.where(has_norm, (x * scale * weight_left).to(raw_left.dtype).to(tl.float32), x)
        y = tl.where(has_norm, (y * scale * weight_right).to(raw_left.dtype).to(tl.float32), y)
    rotated_left = (x * cos_left + y * sin_left).to(raw_left.dtype)
    rotated_right = (y * cos_right + x * sin_right).to(raw_left.dtype)

    query = query_ptr + (token * N + head) * H
    tl.store(query + left, rotated_left, mask=inside & is_query)
    tl.store(query + right, rotated_right, mask=inside & is_query)
    if slot >= 0:
        key = key_ptr + slot // P * key_block + slot % P * key_place + (head - N) * key_head
        tl.store(key + left, rotated_left.to(key_ptr.dtype.element_ty), mask=inside & is_key)
        tl.store(key + right, rotated_right.to(key_ptr.dtype.element_ty), mask=inside & is_key)
        value = value_ptr + slot // P * value_block + slot % P * value_place + (head - N - K) * value_head
        tl.store(value + left, raw_left.to(value_ptr.dtype.element_ty), mask=inside & is_value)
        tl.store(value + right, raw_right.to(value_ptr.dtype.element_ty), mask=inside & is_value)
