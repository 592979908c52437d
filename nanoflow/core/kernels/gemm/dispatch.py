"""GEMM by the fastest kernel that is known for its shape, with what stands around it in a transformer where that pays.

Decoding multiplies 1 to some 64 rows with every weight of the model. That reads memory and computes next to nothing,
so that what counts is to have enough reads in flight on every multiprocessor, from the first moment on: a GEMV for a
single row without tensor cores, whose first weights are on their way before the kernel before has ended; a skinny GEMM
for 2 to 8 rows of small models; a tiled GEMM for up to 64, padded to what tensor cores take; a TMA GEMM for 65 to 256.
`settings` says which of them when, and how; cuBLAS does the rest.

Epilogues: all of them can take in a gate (SiLU of the first half of the outputs times the second half). GEMV and skinny
GEMM also take in the RMSNorm before them, or the residual's addition behind them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanoflow.core.kernels.gemm.gemv import gemv
from nanoflow.core.kernels.gemm.settings import Epilogue, GemvConfig, SkinnyConfig, TiledConfig, find_config
from nanoflow.core.kernels.gemm.silu_mul import silu_mul
from nanoflow.core.kernels.gemm.skinny import skinny_gemm
from nanoflow.core.kernels.gemm.tiled import tiled_gemm
from nanoflow.core.kernels.gemm.tma import tma_gemm
from nanoflow.core.kernels.memory import rows_in_tiles
from nanoflow.core.kernels.pdl import has_room


def linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, gate: bool = False,
    may_split: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As `core.ops.linear.linear`."""
    if x_MK.dtype.itemsize == 2:
        epilogue: Epilogue = "gate" if gate else "split" if may_split and bias_N is None else "plain"
        if (y := _fused(epilogue, x_MK, weight_NK, bias_N, gate=gate)) is not None:
            return y
    y = F.linear(x_MK, weight_NK, bias_N)
    return silu_mul(y) if gate else y


def norm_linear(
    x_MK: torch.Tensor, norm_K: torch.Tensor, eps: float, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *,
    gate: bool,
) -> torch.Tensor | None:  # fmt: skip
    """As `core.ops.linear.norm_linear`; None where two kernels are faster."""
    # Several rows not in float16, where x times the norm's weight, which comes before its scale, may be too large.
    if x_MK.dtype == torch.bfloat16 or (x_MK.dtype == torch.float16 and len(x_MK) == 1):
        return _fused("norm+gate" if gate else "norm", x_MK, weight_NK, bias_N, gate=gate, norm=(norm_K, eps))
    return None


def linear_residual(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, residual_MN: torch.Tensor
) -> torch.Tensor | None:
    """As `core.ops.linear.linear_residual`; None where two kernels are faster."""
    return _fused("residual", x_MK, weight_NK, bias_N, residual_MN=residual_MN) if x_MK.dtype.itemsize == 2 else None


def _fused(
    epilogue: Epilogue, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *,
    gate: bool = False, norm: tuple[torch.Tensor, float] | None = None, residual_MN: torch.Tensor | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """By one kernel of ours; None where others are faster."""
    config = find_config(epilogue, len(x_MK), *weight_NK.shape)
    if isinstance(config, GemvConfig):
        return gemv(x_MK, weight_NK, bias_N, config, gate=gate, norm=norm, residual_MN=residual_MN)
    if config is None or not has_room(x_MK.device):
        return None
    if isinstance(config, SkinnyConfig):
        return skinny_gemm(x_MK, weight_NK, bias_N, config, gate=gate, norm=norm, residual_MN=residual_MN)
    if isinstance(config, TiledConfig):
        return tiled_gemm(x_MK, weight_NK, bias_N, config, gate=gate)
    if rows_in_tiles(x_MK, config.tokens) % config.tokens == 0:
        return tma_gemm(x_MK, weight_NK, bias_N, config, gate=gate)
    return None
