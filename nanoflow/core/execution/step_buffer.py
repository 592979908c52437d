"""What one step reads, as arrays that travel to the device in one copy.

A running sequence has a slot in buffers on the device: its block table, its sampling parameters, the last token that it
sampled. The host says which slots run, and where their new tokens go; it need not know the values of tokens that an
earlier step is still to bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class StepInput:
    """The arrays of a step of T tokens in S sequences: numpy's on the host, or torch's.

    Attributes:
        token_ids_T: int64; -1 - r stands for the last token that slot r sampled.
        positions_T: int64.
        slot_mapping_T: int64; as in `AttentionInput`.
        slots_S: int64; the slot of each sequence.
        targets_S: int64; the slot whose last token the sampled one becomes: its own, or the padding slot if the step
            doesn't reach the sequence's end.
        query_start_S1: int32; as in `AttentionInput`.
        context_lens_S: int32; as in `AttentionInput`. Also the position of the token to be sampled.
    """

    token_ids_T: Any
    positions_T: Any
    slot_mapping_T: Any
    slots_S: Any
    targets_S: Any
    query_start_S1: Any
    context_lens_S: Any


class StepBuffer:
    """Memory for a `StepInput`, on the host (pinned, if a GPU shall copy it) or on a device.

    Attributes:
        num_tokens: T.
        num_seqs: S.
        arrays: views of the memory as numpy arrays; on the host only.
        tensors: the same as tensors.
        memory: uint8 [`num_bytes`].
    """

    def __init__(
        self, num_tokens: int, num_seqs: int, device: torch.device, *, pinned: bool = False,
        memory: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.num_tokens, self.num_seqs = num_tokens, num_seqs
        if memory is None:
            size = self.num_bytes(num_tokens, num_seqs)
            memory = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.memory = memory

    @staticmethod
    def num_bytes(num_tokens: int, num_seqs: int) -> int:
        """Bytes that a step of T tokens in S sequences takes."""
        return 8 * (3 * num_tokens + 2 * num_seqs) + 4 * (2 * num_seqs + 1)

    @property
    def arrays(self) -> StepInput:
        return self._split(self.memory.numpy(), np.int64, np.int32)

    @property
    def tensors(self) -> StepInput:
        return self._split(self.memory, torch.int64, torch.int32)

    def _split(self, memory: Any, long: Any, integer: Any) -> StepInput:
        T, S = self.num_tokens, self.num_seqs
        longs, integers = memory[: 8 * (3 * T + 2 * S)].view(long), memory[8 * (3 * T + 2 * S) :].view(integer)
        return StepInput(
            token_ids_T=longs[:T],
            positions_T=longs[T : 2 * T],
            slot_mapping_T=longs[2 * T : 3 * T],
            slots_S=longs[3 * T : 3 * T + S],
            targets_S=longs[3 * T + S :],
            query_start_S1=integers[: S + 1],
            context_lens_S=integers[S + 1 :],
        )
