"""TMA GEMM, 65 to 256 rows of x: tiles of both operands come by the GPU's tensor memory accelerator.

With so many rows a GEMM takes as long as its tiles take to come from L2. One instruction brings a whole tile, for
which threads would each have to work out addresses and ask for a piece. With fewer rows they are still faster: before
its first tile comes, the description of the tensor has to. A tile that is partly beyond its tensor takes far longer
than a full one, so x is described with the rows that its memory has behind it, and what comes of them is dropped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.core.kernels.gemm.settings import TmaConfig
from nanoflow.core.kernels.gemm.tiling import cut, finished
from nanoflow.core.kernels.memory import rows_in_tiles
from nanoflow.core.kernels.pdl import pdl_launch_then_wait, pdl_options


def tma_gemm(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, config: TmaConfig, *, gate: bool = False
) -> torch.Tensor:
    """x Wᵀ + b, as `cut` has it. Rows of x and W begin at multiples of 16 bytes; their last dims are contiguous."""
    y, part, grid = cut(x_MK, weight_NK, bias_N, config, gate=gate)
    shape = [rows_in_tiles(x_MK, config.tokens), x_MK.shape[1]]
    x = TensorDescriptor(x_MK, shape, list(x_MK.stride()), [config.tokens, config.columns])
    weight = TensorDescriptor.from_tensor(weight_NK, [config.rows, config.columns])
    _tma_gemm[grid](
        x, weight, bias_N, y, len(x_MK), y.shape[-1], part, GATE=gate, BIAS=bias_N is not None, M=config.tokens,
        ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps, num_stages=config.num_stages,
        **pdl_options(x_MK),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _tma_gemm(
    x, weight, bias_ptr, y_ptr, num_rows, num_outputs, part,
    GATE: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_then_wait(PDL)
    first_token, first_row, split = tl.program_id(0) * M, tl.program_id(1) * ROWS, tl.program_id(2)
    sums = tl.zeros((M, ROWS), tl.float32)
    up_sums = tl.zeros((M, ROWS), tl.float32)
    for column in range(split * part, (split + 1) * part, COLUMNS):  # what lies beyond a tensor is read as 0
        tile = x.load([first_token, column])
        sums = tl.dot(tile, weight.load([first_row, column]).T, sums, input_precision="ieee")
        if GATE:
            up_weight = weight.load([num_outputs + first_row, column])
            up_sums = tl.dot(tile, up_weight.T, up_sums, input_precision="ieee")
    token, row = first_token + tl.arange(0, M), first_row + tl.arange(0, ROWS)
    result = finished(sums, up_sums, bias_ptr, row[None, :], num_outputs, y_ptr.dtype.element_ty, GATE, BIAS)
    place = (split.to(tl.int64) * num_rows + token[:, None]) * num_outputs + row[None, :]
    tl.store(y_ptr + place, result, mask=(token < num_rows)[:, None] & (row < num_outputs)[None, :])
