"""Token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embedding(ids_T: torch.Tensor, table_VD: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """The tokens' vectors [T, D].

    Args:
        ids_T: int64; -1 is no token, and gets some vector that means nothing.
        table_VD: one vector a token.
        first: None if the table has all tokens. Otherwise it has V of them, from this one on, and the others' vectors
            are 0: a rank's shard of the vocabulary.
    """
    if first is None:
        return F.embedding(ids_T.clamp(min=0), table_VD)
    rows_T = ids_T - first
    elsewhere_T = (rows_T < 0) | (rows_T >= len(table_VD))
    found_TD = F.embedding(rows_T.masked_fill(elsewhere_T, 0), table_VD)
    return found_TD.masked_fill_(elsewhere_T.unsqueeze(-1), 0)
