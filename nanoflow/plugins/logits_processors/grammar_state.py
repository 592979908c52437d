"""How far an output got in its grammar, and which token ids may come next."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np

from nanoflow.core.config.errors import MOST_SHOWN


class Grammar:
    """How far one output got in its grammar, and what may follow.

    Args:
        matcher: an `LLMatcher` at its start.
        vocab_size: V, the model's; no id past it is ever allowed.
        unwanted: ids to leave out wherever there are others: end-of-sequence, if it is to be ignored.
        unwanted_early: ids to leave out as well before `min_tokens`: those that would end the request.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, unwanted: frozenset[int] = frozenset(),
        unwanted_early: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)
        self.unwanted = unwanted
        self.unwanted_early = unwanted | unwanted_early

    def accept(self, token_id: int) -> bool:
        """Take the next token of the output; False if it can't be, and `error` says why."""
        # A matcher that gave up, while it computed a mask perhaps, allows end-of-sequence alone, and takes it.
        return self.matcher.consume_token(token_id) and not self.matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """Whether the output matches and nothing but its end may follow."""
        return self.matcher.is_stopped()

    def forced(self) -> list[int]:
        """Ids that the output goes on with in any case, as the tokenizer would write them; often none."""
        return list(takewhile(lambda token_id: token_id < self.vocab_size, self.matcher.compute_ff_tokens()))

    @property
    def error(self) -> str:
        """A sentence about what went wrong, empty if nothing did; after that `accept` takes nothing more."""
        return sentence("The output can't be held to structured_outputs", self.matcher.get_error())

    def mask(self, *, is_early: bool = False) -> np.ndarray:
        """Which ids may come next, at least one: int32 [num_words], in which id i is bit i % 32 of word i // 32.

        Args:
            is_early: the output has fewer than `min_tokens`.
        """
        words = np.frombuffer(self.matcher.compute_bitmask(), np.int32)
        words = words[: self.num_words]
        result = np.zeros(self.num_words, np.int32)
        result[: len(words)] = words
        result.view(np.uint32)[-1] &= np.uint32(0xFFFFFFFF >> (-self.vocab_size % 32))
        if unwanted := self.unwanted_early if is_early else self.unwanted:
            wanted = result.view(np.uint32).copy()
            for token_id in unwanted:
                wanted[token_id // 32] &= np.uint32(0xFFFFFFFF - (1 << token_id % 32))
            if wanted.any():
                return wanted.view(np.int32)
        return result


def sentence(start: str, problem: str) -> str:
    """One sentence from the library's message, whose further lines show the place or its state."""
    if not problem:
        return ""
    lines = [line.strip() for line in problem.splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return f"{start}: {reason[:MOST_SHOWN].rstrip('.')}."
