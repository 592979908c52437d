"""The text of a request's output, and the stop strings in it."""

from __future__ import annotations

from nanoflow.core.tokenizer import IncrementalDetokenizer, Tokenizer
from nanoflow.core.types import Sequence


class OutputText:
    """Text of one sequence's output. It is followed token by token only where stop strings have to be found.

    Args:
        tokenizer: None leaves the text empty.
        sequence: whose output it is.
    """

    def __init__(self, tokenizer: Tokenizer | None, sequence: Sequence) -> None:
        self.tokenizer = tokenizer
        self.sequence = sequence
        self.stop = sequence.params.stop or []
        self.detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer and self.stop else None
        self.text = ""
        self.num_searched = 0  # characters in which no stop string begins any more
        self.num_shown = 0  # characters that `news` gave out

    def update(self) -> None:
        """Take the sequence's newest token; ends the sequence if a stop string is complete.

        A stop string counts from the first token after `min_tokens` on, and text before that can't be part of one.
        """
        if self.detokenizer is None:
            return
        self.text += self.detokenizer.push(self.sequence.token_ids[-1])
        if len(self.sequence.token_ids) - self.sequence.num_prompt_tokens < self.sequence.params.min_tokens:
            self.num_searched = len(self.text)
            return
        found = [(self.text.find(stop, self.num_searched), stop) for stop in self.stop]
        found = [(place, stop) for place, stop in found if place >= 0]
        if found:
            place, stop = min(found)
            self.text = self.text[:place]
            self.detokenizer = None
            self.sequence.finish("stop", stop)
        else:
            longest = max(map(len, self.stop))
            self.num_searched = max(self.num_searched, len(self.text) - longest + 1)

    def news(self) -> str:
        """Text that can be shown since the last call: what may yet become a stop string is held back.

        Only for texts with stop strings. All of the rest comes once the sequence has ended.
        """
        end = len(self.text) - self._num_doubtful()
        text = self.final() if self.sequence.is_finished else self.text[:end]
        piece = text[self.num_shown :]
        self.num_shown = len(text)
        return piece

    def _num_doubtful(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
        longest = min(max(map(len, self.stop)) - 1, len(self.text) - self.num_searched)
        return next((n for n in range(longest, 0, -1) if self._may_become_stop(self.text[-n:])), 0)

    def _may_become_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stop)

    def final(self) -> str:
        """The whole text, once the sequence has ended."""
        if self.stop:
            return self.text + (self.detokenizer.flush() if self.detokenizer else "")
        return self.tokenizer.decode(self.sequence.output_token_ids) if self.tokenizer else ""
