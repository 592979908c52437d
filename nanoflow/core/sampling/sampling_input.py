"""Rows of logits to be sampled, and what they are sampled by: on the host and on the logits' device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device


class RowParams(NamedTuple):
    """What S rows are sampled by, on the logits' device.

    Attributes:
        temperature_S: float32; 0 is greedy.
        seed_S: int64; any 64 bits.
        position_S: int32 or int64; index of the token to be sampled in its sequence, below 2**32.
        targets_S: int64; the slots whose last tokens are sampled.
    """

    temperature_S: torch.Tensor
    seed_S: torch.Tensor
    position_S: torch.Tensor
    targets_S: torch.Tensor

    def take(self, index: torch.Tensor | slice) -> RowParams:
        """Those of some rows."""
        return RowParams(*(values_S[index] for values_S in self))


@dataclass(slots=True)
class SamplingInput:
    """S rows of logits to be sampled.

    Attributes:
        sequences: whose they are.
        slots: int64 numpy array [S]; theirs.
        positions: int64 numpy array [S]; index of the token to be sampled in its sequence.
        params: temperature, seed and position on the logits' device.
    """

    sequences: list[Sequence]
    slots: np.ndarray
    positions: np.ndarray
    params: RowParams

    def take(self, chosen: np.ndarray) -> SamplingInput:
        """Some of the rows, by their indices, int64 and rising."""
        if len(chosen) == len(self.slots):
            return self
        params = self.params.take(to_device(chosen, self.params.seed_S.device))
        return SamplingInput(
            [self.sequences[index] for index in chosen.tolist()], self.slots[chosen], self.positions[chosen], params
        )
