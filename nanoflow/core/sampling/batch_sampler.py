"""From the logits of a step's rows to their next tokens, each row by the parameters of its sequence."""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.ops import Ops
from nanoflow.core.sampling.logits import RowLogits
from nanoflow.core.sampling.logprobs import Span, TopLogprobs, num_candidates, top_logprobs
from nanoflow.core.sampling.sampler import Sampler, SamplingInput


class BatchSampler:
    """Sampling parameters of R rows, and what is done by them.

    Args:
        num_rows: R.
        vocab_size: V.
        device: where logits are.
        ops: to change logits and draw with.

    Attributes:
        temperature: float32 numpy array [R]; 0 is greedy.
        seed: int64 numpy array [R]; any 64 bits.
        plain: bool numpy array [R]; whether no more than a plain draw is ever wanted: no filter, no changed logits, no
            log-probabilities.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, ops: Ops) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.filtered = np.zeros(num_rows, bool)
        self.plain = np.zeros(num_rows, bool)
        self.num_logprobs = np.full(num_rows, -1, np.int64)  # -1: none asked for
        self.logits = RowLogits(num_rows, vocab_size, device, ops)
        self.sampler = Sampler(ops)

    def assign(self, row: int, sequence: Sequence) -> None:
        """The row is this sequence's from now on, all of whose tokens are known."""
        params = sequence.params
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.temperature[row] = np.clip(params.temperature, 1e-6, 1e6) if params.temperature > 0 else 0
        self.top_k[row] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self.top_p[row] = max(params.top_p, 1e-30)
        self.min_p[row] = params.min_p
        self.seed[row] = sequence.seed
        self.filtered[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.num_logprobs[row] = -1 if params.logprobs is None else num_candidates(params.logprobs, self.vocab_size)
        self.logits.assign(row, sequence)
        changed = self.logits.always[row] or params.min_tokens > 0
        self.plain[row] = not (self.filtered[row] or changed or params.logprobs is not None)

    def beyond_plain(self, rows: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which of these rows need more than a plain draw for the token at `position`, bool [S]."""
        return self.filtered[rows] | self.logits.changes(rows, position)

    def draw(
        self, logits_SV: torch.Tensor, sequences: list[Sequence], rows: np.ndarray, position: np.ndarray
    ) -> torch.Tensor:
        """Token ids [S], int64.

        Rows whose logits are changed are drawn apart from the others, in float32, so that what a row draws does not
        depend on who is in the batch.

        Args:
            logits_SV: left alone.
            sequences: whose they are.
            rows: int64 [S]; their rows.
            position: int64 [S]; index of the token to be drawn in its sequence.
        """
        changes = self.logits.changes(rows, position)
        if not changes.any():
            return self.sampler(logits_SV, self._inputs(rows, position))
        tokens_S = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for chosen, changed in ((np.flatnonzero(~changes), False), (np.flatnonzero(changes), True)):
            if len(chosen) == 0:
                continue
            place = to_device(chosen, self.device)
            part = logits_SV if len(chosen) == len(rows) else logits_SV[place]
            its_rows, its_position = rows[chosen], position[chosen]
            if changed:
                part = self.logits.change(part, [sequences[i] for i in chosen.tolist()], its_rows, its_position)
            drawn = self.sampler(part, self._inputs(its_rows, its_position))
            if changed:
                self.logits.note(its_rows, drawn)
            tokens_S[place] = drawn
        return tokens_S

    def logprobs(
        self, logits_SV: torch.Tensor, tokens_S: torch.Tensor, sequences: list[Sequence], rows: np.ndarray,
        position: np.ndarray, counts: np.ndarray | bool = True,
    ) -> list[TopLogprobs]:  # fmt: skip
        """Log-probabilities of drawn tokens, of those rows that ask for them; empty if none does.

        Args:
            tokens_S: what was drawn.
            counts: which of the tokens count, bool [S].
            logits_SV, sequences, rows, position: as `draw`'s.
        """
        asking = np.flatnonzero((self.num_logprobs[rows] >= 0) & counts)
        if len(asking) == 0:
            return []
        spans = [Span(sequences[i], int(position[i]), 1, int(self.num_logprobs[rows[i]])) for i in asking.tolist()]
        place = to_device(asking, self.device)
        return [top_logprobs(spans, lambda part: logits_SV[place[part]], tokens_S[place])]

    def _inputs(self, rows: np.ndarray, position: np.ndarray) -> SamplingInput:
        return SamplingInput(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            position=position,
        )
