"""Biases and penalties on logits."""

from __future__ import annotations

import torch


def adjust_logits(
    logits_SV: torch.Tensor, rows_S: torch.Tensor, biased_S: torch.Tensor, bias_RV: torch.Tensor | None,
    penalties_3S: torch.Tensor, counts_RV: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Logits [S, V], float32, with biases added, then penalties applied as vLLM and transformers do.

    Args:
        logits_SV: left alone; any row stride.
        rows_S: int64; rows in the tables.
        biased_S: bool; rows whose entries in `bias_RV` count.
        bias_RV: float32; None where no row is biased.
        penalties_3S: float32, contiguous; repetition, presence and frequency; 1, 0, 0 for none.
        counts_RV: int32; twice how often a row generated each token, and 1 more if its prompt has it; None where no row
            is penalized.
    """
    scores_SV = logits_SV.to(torch.float32, copy=True)
    if bias_RV is not None:
        scores_SV += torch.where(biased_S.unsqueeze(-1), bias_RV[rows_S], 0.0)
    if counts_RV is not None:
        counts_SV = counts_RV[rows_S]
        repetition, presence, frequency = penalties_3S.unsqueeze(-1)
        repetition_SV = torch.where(counts_SV > 0, repetition, 1.0)
        scores_SV = torch.where(scores_SV > 0, scores_SV / repetition_SV, scores_SV * repetition_SV)
        times_SV = counts_SV >> 1
        scores_SV -= frequency * times_SV + presence * (times_SV > 0)
    return scores_SV
