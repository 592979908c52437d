"""`bad_words`: texts that are not generated. The token that would complete one is masked."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.sampling.logits import ALWAYS, mask_tokens

NUM_KEPT = 128  # lists of words whose token ids are kept for the next request with the same ones


class WordTokenizer:
    """Token ids of bad words."""

    def __init__(self, context: LogitsProcessorContext) -> None:
        self.tokenizer, self.vocab_size = context.tokenizer, context.vocab_size
        self._encode = lru_cache(NUM_KEPT)(self._encoded)

    def __call__(self, params: SamplingParams) -> tuple[list[int], ...]:
        """Token ids of what the output must not hold; of no word if there is no tokenizer.

        Raises:
            RequestError: a word is not valid Unicode.
        """
        return self._encode(tuple(params.bad_words or ()))

    def _encoded(self, words: tuple[str, ...]) -> tuple[list[int], ...]:
        found = self.tokenizer.word_token_ids(words) if self.tokenizer and words else []
        # What has an id past the model's can't be generated anyway.
        return tuple(word for word in found if all(token_id < self.vocab_size for token_id in word))


class BadWords(LogitsProcessor):
    """Masks what would complete a word of several tokens. Words of one token are biases, which cost nothing a step."""

    fields = ("bad_words",)

    def __init__(self, context: LogitsProcessorContext) -> None:
        self.tokenizer, self.device = context.tokenizer, context.device
        self.word_token_ids = WordTokenizer(context)
        self.words: list[LongWords | None] = [None] * context.num_slots
        self.has_words = np.zeros(context.num_slots, bool)
        # What each slot sampled last; its value may not be on the host yet.
        self.last_token_R = torch.zeros(context.num_slots, dtype=torch.int64, device=context.device)

    def uses(self, params: SamplingParams) -> bool:
        return bool(params.bad_words)

    def samples_all(self, params: SamplingParams) -> bool:
        return False  # with a constraint all values are known

    def check(self, params: SamplingParams) -> None:
        if self.tokenizer is None:
            raise RequestError("bad_words need a tokenizer, and the checkpoint has none; use logit_bias.")
        self.word_token_ids(params)

    def assign(self, slot: int, sequence: Sequence) -> None:
        long_words = [word for word in self.word_token_ids(sequence.params) if len(word) > 1]
        self.words[slot] = LongWords(long_words) if long_words else None
        self.has_words[slot] = bool(long_words)

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.has_words[slots]

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        entries = [np.empty((3, 0), np.int64)]
        last_token_S = torch.zeros(len(logits_SV), dtype=torch.int64, device=self.device)
        last_token_S[to_device(rows.indices, self.device)] = self.last_token_R[to_device(rows.slots, self.device)]
        places = zip(rows.indices.tolist(), rows.slots.tolist(), rows.positions.tolist(), rows.sequences, strict=True)
        for index, slot, position, sequence in places:
            words = self.words[slot]
            assert words is not None, "only slots that have words are wanted"
            ids, after = words.completions(sequence, position - len(sequence.token_ids))
            entries.append(np.stack((np.full_like(ids, index), ids, after)))
        entries_3N = np.concatenate(entries, 1)
        if entries_3N.size:
            mask_tokens(logits_SV, to_device(entries_3N, self.device), last_token_S)

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        self.last_token_R[to_device(slots, self.device)] = tokens_S

    def release(self, slot: int) -> None:
        self.words[slot] = None


class LongWords:
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
