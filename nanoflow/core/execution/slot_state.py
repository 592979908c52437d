"""Slot state on the device: block tables, sampling parameters and last tokens of running sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.data.transfer import to_device


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a rank keeps on its device for R slots, the last of which is for padding. Steps, captured or not, read it.

    Attributes:
        block_tables_RB: int32.
        last_token_R: int64; what each slot sampled last; a step writes it.
        temperature_R: float32; 0 is greedy.
        seed_R: int64; any 64 bits.
    """

    block_tables_RB: torch.Tensor
    last_token_R: torch.Tensor
    temperature_R: torch.Tensor
    seed_R: torch.Tensor

    @classmethod
    def empty(cls, max_num_seqs: int, width: int, padding_block: int, device: torch.device) -> SlotState:
        """Of as many slots and one for padding, whose block table of `width` entries is `padding_block` throughout."""
        num_slots = max_num_seqs + 1
        block_tables_RB = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        block_tables_RB[-1] = padding_block
        return cls(
            block_tables_RB,
            last_token_R=torch.zeros(num_slots, dtype=torch.int64, device=device),
            temperature_R=torch.zeros(num_slots, dtype=torch.float32, device=device),
            seed_R=torch.zeros(num_slots, dtype=torch.int64, device=device),
        )

    def apply(self, tables_2C: np.ndarray, params_3C: np.ndarray) -> None:
        """Write what changed, in the order of the current stream; both as in `StepMessage`."""
        device = self.seed_R.device
        if tables_2C.size:
            places, blocks = to_device(tables_2C, device)
            self.block_tables_RB.view(-1).index_copy_(0, places, blocks.int())
        if params_3C.size:
            slots, temperatures, seeds = to_device(params_3C, device)
            self.temperature_R.index_copy_(0, slots, temperatures.view(torch.float64).float())
            self.seed_R.index_copy_(0, slots, seeds)
