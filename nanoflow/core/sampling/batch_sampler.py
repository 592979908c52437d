"""Sampling state of all slots, and what is done by it: from logits to the next tokens, and their log-probabilities."""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.ops import Ops
from nanoflow.core.ops.filters import Filters
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.sampling.logprobs import Span, TopLogprobs, num_candidates, top_logprobs
from nanoflow.core.sampling.sampling_input import SamplingInput


class BatchSampler:
    """Sampling parameters by slot, and what is done by them.

    Those of temperature and seed are copied to the device where they changed (`take_changed`), and read there by slot.

    Args:
        num_slots: R.
        vocab_size: V.
        device: where logits are.
        ops: to sample with.
        processors: logits processors, for these slots.

    Attributes:
        temperature: float32 numpy array [R]; 0 is greedy.
        seed: int64 numpy array [R]; any 64 bits.
        filtered: bool numpy array [R]; whether top_k, top_p or min_p leave anything out.
        temperature_only: bool numpy array [R]; whether no more than temperature sampling is ever wanted: no filter, no
            processor, no log-probabilities.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device, ops: Ops, processors: LogitsProcessors
    ) -> None:
        self.vocab_size, self.device, self.ops = vocab_size, device, ops
        self.processors = processors
        self.temperature = np.zeros(num_slots, np.float32)
        self.seed = np.zeros(num_slots, np.int64)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.zeros(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.filtered = np.zeros(num_slots, bool)
        self.temperature_only = np.zeros(num_slots, bool)
        self.num_logprobs = np.full(num_slots, -1, np.int64)  # -1: none asked for
        self._changed: list[int] = []

    def assign(self, slot: int, sequence: Sequence) -> None:
        """The slot is this sequence's from now on, all of whose tokens are known."""
        params, vocab_size = sequence.params, self.vocab_size
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.temperature[slot] = np.clip(params.temperature, 1e-6, 1e6) if params.temperature > 0 else 0
        self.seed[slot] = sequence.seed
        top_k = self.top_k[slot] = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
        self.top_p[slot] = max(params.top_p, 1e-30)
        self.min_p[slot] = params.min_p
        self.filtered[slot] = top_k < vocab_size or params.top_p < 1 or params.min_p > 0
        self.num_logprobs[slot] = -1 if params.logprobs is None else num_candidates(params.logprobs, vocab_size)
        self.processors.assign(slot, sequence)
        more = self.filtered[slot] or self.processors.used[slot] or params.logprobs is not None
        self.temperature_only[slot] = not more
        self._changed.append(slot)

    def release(self, slot: int) -> None:
        """The slot is nobody's."""
        self.processors.release(slot)

    def take_changed(self) -> list[int]:
        """Slots that were assigned since the last call."""
        changed, self._changed = self._changed, []
        return changed

    def needs_resampling(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of these slots want more than temperature sampling for the token at `positions`, bool [S]."""
        needed = self.filtered[slots]
        if self.processors.used[slots].any():
            needed |= self.processors.wants(slots, positions).any(0)
        return needed

    def sample(self, logits_SV: torch.Tensor, rows: SamplingInput) -> torch.Tensor:
        """Token ids [S], int64; `logits_SV` is left alone.

        Rows whose logits are changed are sampled apart from the others, in float32, so that what a row draws does not
        depend on who is in the batch.
        """
        if not self.processors.used[rows.slots].any():
            return self._sample(logits_SV, rows)
        wanted_PS = self.processors.wants(rows.slots, rows.positions)
        changes = wanted_PS.any(0)
        tokens_S = torch.empty(len(changes), dtype=torch.int64, device=self.device)
        for chosen, is_changed in ((np.flatnonzero(~changes), False), (np.flatnonzero(changes), True)):
            if len(chosen) == 0:
                continue
            place, some = to_device(chosen, self.device), rows.take(chosen)
            part = logits_SV if some is rows else logits_SV[place]
            if is_changed:
                part = self.processors.apply(part, some.slots, some.positions, wanted_PS[:, chosen])
            tokens_S[place] = self._sample(part, some)
        self.processors.observe(rows.slots, tokens_S)
        return tokens_S

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        """Tell processors of tokens (int64) that these slots sampled elsewhere."""
        if self.processors.used[slots].any():
            self.processors.observe(slots, tokens_S)

    def logprobs(
        self, logits_SV: torch.Tensor, tokens_S: torch.Tensor, rows: SamplingInput, counts: np.ndarray
    ) -> list[TopLogprobs]:
        """Log-probabilities of sampled tokens, of those rows that ask for them; empty if none does.

        Args:
            logits_SV: raw.
            tokens_S: what was sampled.
            rows: theirs.
            counts: which of the tokens count, bool [S].
        """
        wanted = self.num_logprobs[rows.slots]
        asking = np.flatnonzero((wanted >= 0) & counts)
        if len(asking) == 0:
            return []
        spans = [Span(rows.sequences[i], int(rows.positions[i]), 1, int(wanted[i])) for i in asking.tolist()]
        place = to_device(asking, self.device)
        return [top_logprobs(spans, lambda part: logits_SV[place[part]], tokens_S[place].clamp(min=0))]

    def _sample(self, logits_SV: torch.Tensor, rows: SamplingInput) -> torch.Tensor:
        temperature_S, seed_S, position_S, _ = rows.params
        return self.ops.sample(logits_SV, temperature_S, seed_S, position_S, self._filters(rows.slots))

    def _filters(self, slots: np.ndarray) -> Filters | None:
        """None if none of the slots has any."""
        if not self.filtered[slots].any():
            return None
        top_p_S, min_p_S = to_device(np.stack((self.top_p[slots], self.min_p[slots])), self.device)
        return Filters(to_device(self.top_k[slots], self.device), top_p_S, min_p_S)
