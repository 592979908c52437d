"""Stores a batch's keys and values into a paged cache of any strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def store_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr,
    stride_kt, stride_kk, stride_vt, stride_vk, stride_ckb, stride_ckp, stride_ckk, stride_cvb, stride_cvp, stride_cvk,
    K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program a token: all its heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    block, place = slot // P, slot % P
    heads = tl.arange(0, BLOCK_K)[:, None]
    dims = tl.arange(0, BLOCK_H)[None, :]
    mask = (heads < K) & (dims < H)
    key = tl.load(key_ptr + token * stride_kt + heads * stride_kk + dims, mask=mask)
    value = tl.load(value_ptr + token * stride_vt + heads * stride_vk + dims, mask=mask)
    tl.store(key_cache_ptr + block * stride_ckb + place * stride_ckp + heads * stride_ckk + dims, key, mask=mask)
    tl.store(value_cache_ptr + block * stride_cvb + place * stride_cvp + heads * stride_cvk + dims, value, mask=mask)


def store(
    key_TKH: torch.Tensor, value_TKH: torch.Tensor, key_BPKH: torch.Tensor, value_BPKH: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:  # fmt: skip
    """Put token t's key and value into slot `slots_T[t]`, counted as in `AttentionInput.slot_mapping_T`."""
    num_tokens, num_heads, head_dim = key_TKH.shape
    store_kernel[(num_tokens,)](
        key_TKH, value_TKH, key_BPKH, value_BPKH, slots_T, *key_TKH.stride()[:2], *value_TKH.stride()[:2],
        *key_BPKH.stride()[:3], *value_BPKH.stride()[:3], K=num_heads, H=head_dim, P=key_BPKH.shape[1],
        BLOCK_K=triton.next_power_of_2(num_heads), BLOCK_H=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
