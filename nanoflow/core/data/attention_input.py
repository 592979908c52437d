"""What attention is told of a step: where tokens lie in the cache, and what a layer's projection gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(slots=True)
class AttentionInput:
    """Where the tokens of a batch lie in the KV cache; what `AttentionBackend.plan` gets once a step.

    Tensors are on the engine's device. `query_lens` and `context_lens` are the same facts on the host, for decisions
    that must not wait for the device. In a captured step, whose tensors' content changes from replay to replay, they
    are upper bounds, and `num_decodes` is 0 unless all sequences always decode.

    Attributes:
        slot_mapping_T: int64; token t's keys and values go to block `slot // P`, place `slot % P`.
        query_start_S1: int32, S + 1 entries; sequence s has tokens `query_start[s]` to `query_start[s + 1]`. In a
            captured step the last sequences may have none.
        context_lens_S: int32; tokens of sequence s in the cache once this batch's are stored.
        block_tables_SB: int32; block ids of each sequence. Entries past its context are valid ids with any content.
        query_lens: int64 numpy array, S entries.
        context_lens: int64 numpy array, S entries.
        num_decodes: how many leading sequences are known to have exactly one new token.
        uniform_decode: every sequence decodes, and what it attends to, its new token apart, was stored by earlier
            steps. So storing and attending may go together, sequence by sequence.
    """

    slot_mapping_T: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    query_lens: np.ndarray
    context_lens: np.ndarray
    num_decodes: int
    uniform_decode: bool = False

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.query_lens)


@dataclass(slots=True)
class Projection:
    """What a layer's QKV projection gave, and what is to be done with it before attention.

    Attributes:
        qkv_TE: E = (N + 2K) * H: query heads, then key heads, then value heads; any row stride.
        q_weight_H, k_weight_H: weights of the RMS norms over each query and key head; None for no norm.
        eps: of both norms.
        cos_LH, sin_LH: float32 tables of cosines and signed sines, by position.
        positions_T: int64; row of the tables for each token.
    """

    qkv_TE: torch.Tensor
    q_weight_H: torch.Tensor | None
    k_weight_H: torch.Tensor | None
    eps: float
    cos_LH: torch.Tensor
    sin_LH: torch.Tensor
    positions_T: torch.Tensor
