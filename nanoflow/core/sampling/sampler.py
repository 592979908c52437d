"""The sampler: draws the tokens of a step's rows by their parameters, which lie on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.data.transfer import to_device
from nanoflow.core.ops import Ops
from nanoflow.core.ops.sampling import Filters


@dataclass(slots=True)
class SamplingInput:
    """Sampling parameters of the S rows that sample. Arrays are on the host, S entries each.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int64; V or more keeps all.
        top_p: float32.
        min_p: float32.
        seed: int64; any 64 bits.
        position: int64; index of the token to be sampled in its sequence.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray


class Sampler:
    """Stateless; does only the work that some row of the batch asks for.

    Args:
        ops: to draw with.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def __call__(self, logits_SV: torch.Tensor, inputs: SamplingInput) -> torch.Tensor:
        """Sampled token ids [S], int64, on the logits' device."""
        random_rows = np.flatnonzero(inputs.temperature > 0)
        if len(random_rows) == 0:
            return logits_SV.argmax(-1)
        if logits_SV.is_cuda or len(random_rows) == len(inputs.temperature):
            return self._draw(logits_SV, inputs, slice(None))
        token_ids = logits_SV.argmax(-1)
        token_ids[random_rows] = self._draw(logits_SV[random_rows], inputs, random_rows)
        return token_ids

    def _draw(self, logits_RV: torch.Tensor, inputs: SamplingInput, rows: np.ndarray | slice) -> torch.Tensor:
        """Draw for these rows of the batch, whose logits are given."""
        temperature, top_k, top_p, min_p = (
            values[rows] for values in (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
        )
        floats = to_device(np.stack((temperature, top_p, min_p)), logits_RV.device)
        integers = to_device(np.stack((inputs.seed[rows], inputs.position[rows], top_k)), logits_RV.device)
        filtered = (top_k < logits_RV.shape[-1]) | (top_p < 1) | (min_p > 0)
        filters = Filters(integers[2], floats[1], floats[2]) if filtered.any() else None
        return self.ops.sample(logits_RV, floats[0], integers[0], integers[1], filters)
