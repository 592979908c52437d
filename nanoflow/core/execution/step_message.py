"""What rank 0 sends the others for a step: the arrays that it reads, and what changed in the rows, in one piece."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.execution.step_buffer import StepBuffer

HEADER = 8  # numbers


@dataclass(slots=True)
class StepMessage:
    """One step as bytes.

    Attributes:
        step: its arrays on the host, padding included.
        uniform_decode: as in `AttentionInput`.
        captured: whether it is replayed as a graph.
        drawn_by_all: whether the graph's draw is all that is wanted; otherwise rank 0 draws, and tells the others.
        num_decodes: as in `AttentionInput`.
        scored_L: int64; tokens of the step whose logits are wanted, beside those of last tokens.
        tables_2C: int64; places in the block tables that change, and the blocks to put there.
        params_2R: int64; all rows' temperatures, as bits of float64, and seeds; [2, 0] if they are as they were.
    """

    step: StepBuffer
    uniform_decode: bool
    captured: bool
    drawn_by_all: bool
    num_decodes: int
    scored_L: np.ndarray
    tables_2C: np.ndarray
    params_2R: np.ndarray

    def pack(self) -> np.ndarray:
        """As uint8."""
        numbers = [self.step.num_tokens, self.step.num_seqs, self.uniform_decode, self.captured, self.drawn_by_all]
        sizes = [self.num_decodes, len(self.scored_L), self.tables_2C.shape[1]]
        arrays = (np.array(numbers + sizes, np.int64), self.scored_L, self.tables_2C, self.params_2R)
        return np.concatenate([*(array.reshape(-1).view(np.uint8) for array in arrays), self.step.memory.numpy()])

    @classmethod
    def unpack(cls, message: bytes, *, pinned: bool) -> StepMessage:
        """From `pack`'s bytes; the step's arrays are copied to memory of their own.

        It is pinned where told to, for a GPU to copy it, unless the step is captured and goes into pinned I/O first.
        """
        num_tokens, num_seqs, uniform_decode, captured, drawn_by_all, num_decodes, scored, changes = np.frombuffer(
            message, np.int64, HEADER
        ).tolist()
        step = StepBuffer(num_tokens, num_seqs, torch.device("cpu"), pinned=pinned and not captured)
        num_bytes = len(step.memory)
        step.memory.numpy()[:] = np.frombuffer(message, np.uint8, offset=len(message) - num_bytes)
        rest = np.frombuffer(message, np.int64, (len(message) - num_bytes) // 8)[HEADER:].copy()
        scored_L, tables_2C, params_2R = np.split(rest, [scored, scored + 2 * changes])
        return cls(
            step, bool(uniform_decode), bool(captured), bool(drawn_by_all), num_decodes, scored_L,
            tables_2C.reshape(2, -1), params_2R.reshape(2, -1),
        )  # fmt: skip
