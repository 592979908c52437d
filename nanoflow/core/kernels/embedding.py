"""Token embedding, of which a rank may have a shard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanoflow.core.kernels.pdl import pdl_options, pdl_wait_then_launch


def embedding(ids_T: torch.Tensor, table_VD: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """As `core.ops.embedding.embedding`; of a table with all tokens, too, tokens that it doesn't have get 0."""
    num_tokens, (size, width) = len(ids_T), table_VD.shape
    out_TD = torch.empty((num_tokens, width), dtype=table_VD.dtype, device=table_VD.device)
    if num_tokens > 0:
        _embedding[(num_tokens,)](
            ids_T, table_VD, out_TD, first or 0, size, width, BLOCK=min(4096, triton.next_power_of_2(width)),
            **pdl_options(table_VD),
        )  # fmt: skip
    return out_TD


@triton.jit(do_not_specialize=["first"])
def _embedding(ids_ptr, table_ptr, out_ptr, first, size, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    pdl_wait_then_launch(PDL)
    row = tl.load(ids_ptr + token) - first
    length = tl.where((row >= 0) & (row < size), width, 0)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        vector = tl.load(table_ptr + row * width + column, mask=column < length, other=0.0)
        tl.store(out_ptr + token * width + column, vector, mask=column < width)
