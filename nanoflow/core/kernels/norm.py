"""RMSNorm, with the residual addition before it in one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.memory import empty_rows
from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `core.ops.norm.rms_norm`."""
    return add_rms_norm(None, x.reshape(-1, *weight.shape), weight, eps)[0].view(x.shape)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual`, and that sum, which overwrites `residual`.

    Args:
        x: [T, D]; or [C, T, D], C partials that a split-K GEMM (in float32) or experts left to add up; or None
            for 0.
        residual: [T, D]; any row stride. Without `x` it is left alone.
        weight: [D]
        eps: added to the mean square.
    """
    num_rows, size = residual.shape
    out = empty_rows(num_rows, size, dtype=residual.dtype, device=residual.device)
    if num_rows == 0:
        return out, residual
    parts = 0 if x is None else x.shape[0] if x.dim() == 3 else 1
    source = residual if x is None else x
    block = triton.next_power_of_2(size)
    num_warps = max(1, min(8, block // 128), min(16, block // 512))  # few values a thread: a row is soon added up
    _add_rms_norm[(num_rows,)](
        source, residual, weight, out, size, eps,
        source.stride(-2), source.stride(0) if parts > 1 else 0, residual.stride(0),
        PARTS=parts, BLOCK=block, num_warps=num_warps, **pdl_options(residual),
    )  # fmt: skip
    return out, residual


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, size, eps, x_stride, part_stride, residual_stride,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    pdl_launch_then_wait(PDL)
    dtype = residual_ptr.dtype.element_ty
    total = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            x += tl.load(x_ptr + part * part_stride + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = (x.to(dtype).to(tl.float32) + total).to(dtype)
        tl.store(residual_ptr + row * residual_stride + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / size + eps)
    tl.store(out_ptr + row * size + columns, (total * scale * weight).to(dtype), mask=inside)
