"""What requests do to their logits before a token is drawn: masks, biases and penalties, on the device.

What a row adds to its logits, and how often it has seen each token, lies in tables [R, V] on the device. A table is
made when the first request asks for it, a row of it is filled when a sequence gets the row, and drawn tokens are
counted where they are, so that a step need not know the values of tokens that an earlier step is still to bring.
"""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.ops import Ops
from nanoflow.core.sampling.structured_output import TokenMasks

# Entries of a table of counts, as `adjust_logits` takes them.
IN_PROMPT, GENERATED = 1, 2
ALWAYS = -1  # in place of a token id: whatever the last token is


class RowLogits:
    """Masks, biases and penalties of R rows.

    Args:
        num_rows: R.
        vocab_size: V.
        device: where logits are.
        ops: to change them with.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, ops: Ops) -> None:
        self.vocab_size, self.device, self.ops = vocab_size, device, ops
        self.biased = np.zeros(num_rows, bool)
        self.penalized = np.zeros(num_rows, bool)
        self.penalties_3R = np.zeros((3, num_rows), np.float32)  # repetition, presence, frequency
        self.words: list[BadWords | None] = [None] * num_rows
        self.always = np.zeros(num_rows, bool)  # any of the above, or a grammar
        self.min_len = np.zeros(num_rows, np.int64)  # no stop token before so many tokens, prompt included
        self.bias_RV: torch.Tensor | None = None  # float32; -inf is forbidden
        self.counts_RV: torch.Tensor | None = None  # int32
        # What each row drew last. (A captured step has overwritten `SlotState.last_token_R` before logits are changed.)
        self.newest_R = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def assign(self, row: int, sequence: Sequence) -> None:
        """The row is this sequence's from now on, all of whose tokens are known."""
        params = sequence.params
        penalties = params.penalties or (1, 0, 0)
        self.penalized[row] = params.penalties is not None
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.penalties_3R[:, row] = np.clip(penalties[0], 1e-6, 1e6), *penalties[1:]
        long_words = [word for word in sequence.bad_words if len(word) > 1]
        self.words[row] = BadWords(long_words) if long_words else None
        tokens = [word[0] for word in sequence.bad_words if len(word) == 1]
        self.biased[row] = bool(tokens or params.logit_bias or params.allowed_token_ids)
        self.always[row] = self.penalized[row] or self.biased[row] or bool(long_words) or sequence.grammar is not None
        self.min_len[row] = sequence.num_prompt_tokens + params.min_tokens if params.min_tokens else 0
        if self.biased[row]:
            self._fill_bias(row, params.allowed_token_ids, params.logit_bias or {}, tokens)
        if self.penalized[row]:
            self._fill_counts(row, sequence)

    def changes(self, rows: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which of these rows change the logits of the token at `position`, bool [S]."""
        return self.always[rows] | (position < self.min_len[rows])

    def change(
        self, logits_SV: torch.Tensor, sequences: list[Sequence], rows: np.ndarray, position: np.ndarray
    ) -> torch.Tensor:
        """Logits [S, V], float32, as these rows want them.

        Args:
            logits_SV: left alone.
            sequences: whose they are.
            rows: int64 [S]; their rows.
            position: int64 [S]; index of the token to be drawn in its sequence.
        """
        rows_S = to_device(rows, self.device)
        bias_RV = self.bias_RV if self.biased[rows].any() else None
        counts_RV = self.counts_RV if self.penalized[rows].any() else None
        biased_S = to_device(self.biased[rows], self.device)
        penalties_3S = to_device(np.ascontiguousarray(self.penalties_3R[:, rows]), self.device)
        scores_SV = self.ops.adjust_logits(logits_SV, rows_S, biased_S, bias_RV, penalties_3S, counts_RV)
        forbidden = self._forbidden(sequences, rows, position)
        if forbidden.size:
            forbid(scores_SV, to_device(forbidden, self.device), self.newest_R[rows_S])
        masks = TokenMasks([], [])
        for index, sequence in enumerate(sequences):
            if sequence.grammar is not None:  # its last token is known: the scheduler waited for it
                masks.rows.append(index)
                masks.words.append(sequence.grammar.mask(is_early=bool(position[index] < self.min_len[rows[index]])))
        if masks.rows:
            masks.apply(scores_SV)
        return scores_SV

    def note(self, rows: np.ndarray, tokens_S: torch.Tensor) -> None:
        """These rows, whose logits were changed, drew these tokens (int64)."""
        rows_S = to_device(rows, self.device)
        self.newest_R[rows_S] = tokens_S
        if self.counts_RV is not None:  # counts of a row without penalties are never read
            counts = self.counts_RV.view(-1)
            counts.scatter_add_(0, rows_S * self.vocab_size + tokens_S, counts.new_full(tokens_S.shape, GENERATED))

    def _fill_bias(self, row: int, allowed: list[int] | None, bias: dict[int, float], forbidden: list[int]) -> None:
        if self.bias_RV is None:
            self.bias_RV = torch.empty(len(self.biased), self.vocab_size, device=self.device)
        bias_V = self.bias_RV[row]
        bias_V.fill_(-torch.inf if allowed else 0)
        if allowed:
            bias_V.index_fill_(0, self._ids(allowed), 0)
        if bias:
            values = to_device(np.array(list(bias.values()), np.float32), self.device)
            bias_V.index_add_(0, self._ids(list(bias)), values)
        if forbidden:
            bias_V.index_fill_(0, self._ids(forbidden), -torch.inf)

    def _fill_counts(self, row: int, sequence: Sequence) -> None:
        if self.counts_RV is None:
            self.counts_RV = torch.empty(len(self.biased), self.vocab_size, dtype=torch.int32, device=self.device)
        counts_V = self.counts_RV[row].zero_()
        counts_V.index_fill_(0, self._ids(sequence.token_ids[: sequence.num_prompt_tokens]), IN_PROMPT)
        output = self._ids(sequence.output_token_ids)
        counts_V.scatter_add_(0, output, counts_V.new_full(output.shape, GENERATED))

    def _ids(self, token_ids: list[int]) -> torch.Tensor:
        return to_device(np.array(token_ids, np.int64), self.device)

    def _forbidden(self, sequences: list[Sequence], rows: np.ndarray, position: np.ndarray) -> np.ndarray:
        """As `forbid` takes it: stop tokens before `min_tokens`, and what would complete a bad word."""
        entries = [np.empty((3, 0), np.int64)]
        for index in np.flatnonzero(position < self.min_len[rows]).tolist():
            stops = sequences[index].stop_token_ids if sequences[index].grammar is None else ()  # a grammar sees to it
            entries.append(np.array([[index] * len(stops), list(stops), [ALWAYS] * len(stops)], np.int64))
        for index, (sequence, row) in enumerate(zip(sequences, rows.tolist(), strict=True)):
            if (words := self.words[row]) is not None:
                ids, after = words.completions(sequence, int(position[index]) - len(sequence.token_ids))
                entries.append(np.stack((np.full_like(ids, index), ids, after)))
        return np.concatenate(entries, 1)


class BadWords:
    """Words of several tokens that one sequence must not generate.

    Args:
        words: token ids of each word, at least two.
    """

    def __init__(self, words: list[list[int]]) -> None:
        self.num_before = max(map(len, words)) - 1
        padded = [[ALWAYS] * (self.num_before + 1 - len(word)) + word for word in words]
        self.beginnings_WL, self.ends_W = np.split(np.array(padded, np.int64), [self.num_before], 1)
        self.ends_W = self.ends_W[:, 0]

    def completions(self, sequence: Sequence, num_unknown: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that would complete a word now, and for each the last token on which that depends, or `ALWAYS`.

        Args:
            sequence: whose output counts; a word that began in the prompt does not.
            num_unknown: tokens after the known ones whose values a step is still to bring, 0 or 1.
        """
        assert num_unknown in (0, 1), "one step at most is in flight"
        token_ids = sequence.token_ids
        known = token_ids[max(sequence.num_prompt_tokens, len(token_ids) - self.num_before) :]
        tail = np.array([*[-2] * (self.num_before - len(known)), *known], np.int64)  # -2 is in no word
        if num_unknown:
            tail = np.append(tail[1:], ALWAYS)
        agrees = (self.beginnings_WL == tail) | (self.beginnings_WL == ALWAYS) | (tail == ALWAYS)
        matching = agrees.all(1)
        ends = self.ends_W[matching]
        return ends, self.beginnings_WL[matching, -1] if num_unknown else np.full_like(ends, ALWAYS)


def forbid(scores_SV: torch.Tensor, entries_3N: torch.Tensor, last_token_S: torch.Tensor) -> None:
    """Set scores to -inf, in place.

    Args:
        scores_SV: contiguous.
        entries_3N: int64; for each of N entries an index of S, the token id, and the last token that the row must have
            for the entry to count, or `ALWAYS`.
        last_token_S: int64; the last tokens.
    """
    index_N, token_N, after_N = entries_3N
    counts_N = (after_N == ALWAYS) | (last_token_S[index_N] == after_N)
    # By adding, since several entries, some of which don't count, may be of one score.
    places_N = index_N * scores_SV.shape[1] + token_N
    scores_SV.view(-1).scatter_add_(0, places_N, torch.where(counts_N, -torch.inf, 0.0))
