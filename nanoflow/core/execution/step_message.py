"""A step as every rank executes it, and as bytes that the driver sends to the workers: the arrays that it reads, and
what changed in the slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanoflow.core.execution.step_buffer import StepBuffer

STEP, CALL = 0, 1  # what a message is, its first number
HEADER = 10  # numbers


@dataclass(slots=True)
class StepMessage:
    """One step.

    Attributes:
        buffer: its arrays on the host, padding included.
        uniform_decode: as in `AttentionInput`.
        captured: whether it is replayed as a graph.
        temperature_only: whether all that sample want no more than temperature sampling, so that all ranks do it;
            otherwise rank 0 samples the rest, and tells the others.
        num_decodes: as in `AttentionInput`.
        scored_L: int64; tokens of the step whose logits are wanted, beside those of last tokens; none if captured.
        tables_2C: int64; places in the flat block tables that change, and the blocks to put there.
        params_3C: int64; slots whose sampling parameters change: the slot, its temperature as bits of float64, its
            seed.
    """

    buffer: StepBuffer
    uniform_decode: bool
    captured: bool
    temperature_only: bool
    num_decodes: int
    scored_L: np.ndarray
    tables_2C: np.ndarray
    params_3C: np.ndarray

    def pack(self) -> np.ndarray:
        """As uint8."""
        buffer, changed = self.buffer, (self.tables_2C.shape[1], self.params_3C.shape[1])
        flags = self.uniform_decode, self.captured, self.temperature_only
        sizes = buffer.num_tokens, buffer.num_seqs, self.num_decodes, len(self.scored_L)
        header = np.array((STEP, *flags, *sizes, *changed), np.int64)
        arrays = (header, self.scored_L, self.tables_2C, self.params_3C)
        return np.concatenate([*(array.reshape(-1).view(np.uint8) for array in arrays), buffer.memory.numpy()])

    @classmethod
    def unpack(cls, message: bytes, open_buffer: Callable[[int, int, bool], StepBuffer]) -> StepMessage:
        """From `pack`'s bytes.

        Args:
            message: what `pack` made.
            open_buffer: where to put the arrays of a step of so many tokens and sequences that is captured or not.

        Raises:
            ValueError: the message is too short.
        """
        _, uniform_decode, captured, temperature_only, num_tokens, num_seqs, num_decodes, scored, tables, params = (
            np.frombuffer(message, np.int64, HEADER).tolist()
        )
        buffer = open_buffer(num_tokens, num_seqs, bool(captured))
        num_bytes = len(buffer.memory)
        buffer.memory.numpy()[:] = np.frombuffer(message, np.uint8, offset=len(message) - num_bytes)
        rest = np.frombuffer(message, np.int64, scored + 2 * tables + 3 * params, 8 * HEADER).copy()
        scored_L, tables_2C, params_3C = np.split(rest, [scored, scored + 2 * tables])
        return cls(
            buffer, bool(uniform_decode), bool(captured), bool(temperature_only), num_decodes, scored_L,
            tables_2C.reshape(2, -1), params_3C.reshape(3, -1),
        )  # fmt: skip
