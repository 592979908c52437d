"""Fused all-reduce + RMSNorm, over memory that ranks share."""

from __future__ import annotations

import torch

EMPTY = -1  # a word that has not arrived; one of float32 would be NaN, one of two values two NaN


def allreduce_add_rms_norm(
    x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, inboxes_N: torch.Tensor,
    calls: torch.Tensor, left_1: torch.Tensor, rank: int, most_words: int, *, owned: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """`add_rms_norm` of the sum of all ranks' `x`, which are rounded to the residual's dtype before they are added up.

    The sum is made in float32 and rounded, and has the same bits on all ranks, which all make the same calls in the
    same order. None, on all of them: make two operations of it (`Group.all_reduce`, `add_rms_norm`).

    Args:
        x: [T, D]; or [C, T, D], C partials of it. T is 1 to R.
        residual_TD: of a dtype of 2 or 4 bytes; any row stride. It is overwritten.
        weight_D: the norm's factors.
        eps: added to the mean square.
        inboxes_N: int64, addresses of the N ranks' inboxes, each int32 [2, N, `most_words`]: by call, and by sender.
            All words are `EMPTY` before and after a call. Addresses are multiples of 16.
        calls: int32 [R], all of them how many there have been: 0 before the first. R is a power of two.
        left_1: int32; anything but 0 ends this and all later calls without the others' words.
        rank: this one.
        most_words: no less than T times D, halved for dtypes of 2 bytes.
        owned: whether each row has a rank that adds it up for all; then T is at least N.

    Returns:
        The norm [T, D], and x + residual [T, D].
    """
    return None
