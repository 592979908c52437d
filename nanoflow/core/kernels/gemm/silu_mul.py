"""SiLU of one half times the other half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2F] -> [T, F]: silu(first half) * second half. Any row stride."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows > 0:
        block = 512 if num_rows < 64 else 2048
        grid = (num_rows, triton.cdiv(size, block))
        _silu_mul[grid](gate_up, out, size, gate_up.stride(0), BLOCK=block, num_warps=block // 512, **pdl_options(out))
    return out


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, size, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    pdl_launch_then_wait(PDL)
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + size + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * size + columns, gated(gate, up), mask=inside)


@triton.jit
def gated(gate, up):
    """silu(gate) * up, rounded after each factor as PyTorch does it."""
    x = gate.to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
