"""Operations on logits that logits processors share, on the device."""

from __future__ import annotations

import torch

# Entries of a table of counts, as `Ops.adjust_logits` takes them: in the prompt, and for each time it was generated.
IN_PROMPT, GENERATED = 1, 2
ALWAYS = -1  # in place of a token id: whatever the last token is


def mask_tokens(logits_SV: torch.Tensor, entries_3N: torch.Tensor, last_token_S: torch.Tensor | None = None) -> None:
    """Set the logits of single tokens to -inf, in place.

    Args:
        logits_SV: contiguous.
        entries_3N: int64; for each of N entries an index of S, the token id, and the last token that the row must have
            for the entry to count, or `ALWAYS`.
        last_token_S: int64; the last tokens; None where all entries are for `ALWAYS`.
    """
    index_N, token_N, after_N = entries_3N
    places_N = index_N * logits_SV.shape[1] + token_N
    if last_token_S is None:
        logits_SV.view(-1).index_fill_(0, places_N, -torch.inf)
        return
    counts_N = (after_N == ALWAYS) | (last_token_S[index_N] == after_N)
    # By adding, since several entries, some of which don't count, may be of one logit.
    logits_SV.view(-1).scatter_add_(0, places_N, torch.where(counts_N, -torch.inf, 0.0))


def mask_bits(logits_SV: torch.Tensor, rows_G: torch.Tensor, words_GW: torch.Tensor) -> None:
    """Set the logits of ids whose bit is 0 to -inf, in place.

    Args:
        logits_SV: any float dtype.
        rows_G: int32; distinct rows of the logits.
        words_GW: int32, W = ceil(V / 32); bit i % 32 of word i // 32 is that of id i.
    """
    bytes_GB = words_GW.view(torch.uint8)  # low byte first, on all that torch runs on
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_SV.device)
    masked_GV = ((bytes_GB.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits_SV.shape[1]] == 0
    rows_G = rows_G.long()
    logits_SV[rows_G] = logits_SV[rows_G].masked_fill_(masked_GV, -torch.inf)
