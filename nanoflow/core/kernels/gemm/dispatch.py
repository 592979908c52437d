"""Matrix products with few rows, which are as fast as the weights can be read.

Decoding multiplies 1 to some 64 rows with every weight of the model. That reads memory and computes next to nothing,
so that what counts is to have enough reads in flight on every multiprocessor, from the first moment on. Two kernels:
one for a single row without tensor cores, whose first weights are on their way before the kernel before has ended, and
one for a few rows, padded to what tensor cores take. `few_rows` has a third, for 2 to 8 rows of small models, and
`many_rows` a fourth, for 65 to 256.

Both can take in what stands around a product in a transformer: `gate`, SiLU of the first half of the outputs times the
second half, and the single-row one also the RMS norm before it, or the residual's addition behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanoflow.core.kernels.gemm.gemv import vector_linear, vector_setting
from nanoflow.core.kernels.gemm.silu_mul import silu_mul
from nanoflow.core.kernels.gemm.skinny import few_linear, few_setting
from nanoflow.core.kernels.gemm.tiled import tile_linear, tile_setting
from nanoflow.core.kernels.gemm.tma import many_linear, many_setting
from nanoflow.core.kernels.memory import rows_in_tiles
from nanoflow.core.kernels.pdl import has_room


def linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, gate: bool = False,
    may_split: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ + b, with `gate` as in `vector_linear`, by the fastest way that is known for these shapes.

    With `may_split` the result may be [C, M, N] float32 partials.
    """
    num_rows, size = x_MK.shape
    if x_MK.dtype.itemsize == 2 and num_rows > 0 and size % 16 == 0:
        may_split = may_split and bias_N is None and not gate
        if (y := _in_one_go(x_MK, weight_NK, bias_N, gate=gate, may_split=may_split)) is not None:
            return y
        if has_room(x_MK.device):
            many = many_setting(num_rows, weight_NK.shape[0], size, gate=gate, may_split=may_split)
            if many is not None and rows_in_tiles(x_MK, many.tokens) % many.tokens == 0:
                return many_linear(x_MK, weight_NK, bias_N, many, gate=gate)
            tile = tile_setting(num_rows, weight_NK.shape[0], size, gate=gate, may_split=may_split)
            if tile is not None:
                return tile_linear(x_MK, weight_NK, bias_N, tile, gate=gate)
    y = F.linear(x_MK, weight_NK, bias_N)
    return silu_mul(y) if gate else y


def normed_linear(
    x_MK: torch.Tensor, norm_K: torch.Tensor, eps: float, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *,
    gate: bool,
) -> torch.Tensor | None:  # fmt: skip
    """`linear` of x's RMS norm in one kernel; None where two kernels are faster."""
    # Several rows not in float16, where x times the norm's weight, which comes before its scale, may be too large.
    if x_MK.dtype == torch.bfloat16 or (x_MK.dtype == torch.float16 and len(x_MK) == 1):
        return _in_one_go(x_MK, weight_NK, bias_N, gate=gate, norm=(norm_K, eps))
    return None


def added_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, residual_MN: torch.Tensor
) -> torch.Tensor | None:
    """`linear` added to the residual, in its place, in one kernel; None where two kernels are faster."""
    return _in_one_go(x_MK, weight_NK, bias_N, residual_MN=residual_MN) if x_MK.dtype.itemsize == 2 else None


def _in_one_go(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, gate: bool = False,
    norm: tuple[torch.Tensor, float] | None = None, residual_MN: torch.Tensor | None = None, may_split: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """As `vector_linear` for one row and `few_linear` for several; None where other kernels are faster."""
    num_outputs, size = weight_NK.shape
    if len(x_MK) == 1 and size % 16 == 0:
        vector = vector_setting(num_outputs, size, gate=gate, normed=norm is not None)
        return vector_linear(x_MK, weight_NK, bias_N, vector, gate=gate, norm=norm, residual_MN=residual_MN)
    setting = few_setting(len(x_MK), *weight_NK.shape, gate=gate, add=residual_MN is not None, may_split=may_split)
    if setting is None or not has_room(x_MK.device):
        return None
    return few_linear(x_MK, weight_NK, bias_N, setting, gate=gate, norm=norm, residual_MN=residual_MN)
