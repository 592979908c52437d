"""Biases and penalties in one pass over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # candidates a program


def adjust_logits(
    logits_SV: torch.Tensor, rows_S: torch.Tensor, biased_S: torch.Tensor, bias_RV: torch.Tensor | None,
    penalties_3S: torch.Tensor, counts_RV: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `core.ops.logits.adjust_logits`."""
    num_rows, size = logits_SV.shape
    scores_SV = torch.empty((num_rows, size), dtype=torch.float32, device=logits_SV.device)
    if num_rows > 0:
        _adjust[(num_rows, triton.cdiv(size, BLOCK))](
            logits_SV, rows_S, biased_S.view(torch.int8), bias_RV, penalties_3S, counts_RV, scores_SV, num_rows, size,
            logits_SV.stride(0), BIASED=bias_RV is not None, PENALIZED=counts_RV is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return scores_SV


@triton.jit(do_not_specialize=["num_rows"])
def _adjust(
    logits_ptr, rows_ptr, biased_ptr, bias_ptr, penalties_ptr, counts_ptr, scores_ptr, num_rows, size, stride,
    BIASED: tl.constexpr, PENALIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    candidate = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = candidate < size
    score = tl.load(logits_ptr + index * stride + candidate, mask=inside, other=0.0).to(tl.float32)
    if BIASED:  # noqa: SIM102 (decided when it is compiled)
        if tl.load(biased_ptr + index) != 0:
            score += tl.load(bias_ptr + row * size + candidate, mask=inside, other=0.0)
    if PENALIZED:
        repetition = tl.load(penalties_ptr + index)
        presence = tl.load(penalties_ptr + num_rows + index)
        frequency = tl.load(penalties_ptr + 2 * num_rows + index)
        count = tl.load(counts_ptr + row * size + candidate, mask=inside, other=0)
        penalized = tl.where(score > 0, score / repetition, score * repetition)
        score = tl.where(count > 0, penalized, score)
        times = count >> 1
        score -= frequency * times.to(tl.float32) + tl.where(times > 0, presence, 0.0)
    tl.store(scores_ptr + index * size + candidate, score, mask=inside)
