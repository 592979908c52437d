"""`min_tokens`: no stop token is sampled before so many tokens."""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.sampling.logits import ALWAYS, mask_tokens


class MinTokens(LogitsProcessor):
    """Masks stop tokens at first. Where there is a grammar, that sees to it, and yields where nothing else is left."""

    fields = ("min_tokens",)

    def __init__(self, context: LogitsProcessorContext) -> None:
        self.device = context.device
        self.min_len = np.zeros(context.num_slots, np.int64)  # prompt included
        self.stops: list[list[int]] = [[] for _ in range(context.num_slots)]

    def uses(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0 and params.structured_outputs is None

    def assign(self, slot: int, sequence: Sequence) -> None:
        self.min_len[slot] = sequence.num_prompt_tokens + sequence.params.min_tokens
        self.stops[slot] = list(sequence.stop_token_ids)

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return positions < self.min_len[slots]

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        stops = [self.stops[slot] for slot in rows.slots.tolist()]
        index_N = np.repeat(rows.indices, [len(ids) for ids in stops])
        token_N = np.array([token_id for ids in stops for token_id in ids], np.int64)
        if token_N.size:
            entries_3N = np.stack((index_N, token_N, np.full_like(token_N, ALWAYS)))
            mask_tokens(logits_SV, to_device(entries_3N, self.device))
