"""The text of a request's output, and the stop strings in it."""

from __future__ import annotations

from nanoflow.core.data.sequence import Sequence
from nanoflow.core.text.tokenizer import IncrementalDetokenizer, Tokenizer


class OutputText:
    """Text of one sequence's output. It is followed token by token only where stop strings have to be found.

    Args:
        tokenizer: None leaves the text empty, and so does `SamplingParams.detokenize` where it is false.
        sequence: whose output it is.
    """

    def __init__(self, tokenizer: Tokenizer | None, sequence: Sequence) -> None:
        params = sequence.params
        self.tokenizer = tokenizer if params.detokenize else None
        self.sequence = sequence
        self.stop = params.stop or []
        self.include_stop = params.include_stop_str_in_output
        self.skip_special_tokens = params.skip_special_tokens
        self.detokenizer: IncrementalDetokenizer | None = None
        if self.tokenizer and self.stop:
            self.detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=self.skip_special_tokens)
        self.text = ""
        self.num_taken = 0  # tokens of the output whose text is in `text`, or held back by the detokenizer
        self.num_searched = 0  # characters in which no stop string begins any more
        self.num_shown = 0  # characters that `news` gave out

    def update(self) -> None:
        """Take the sequence's newest tokens; ends it, without those that follow, if a stop string is complete.

        A stop string counts from the first token after `min_tokens` on, and text before that can't be part of one.
        """
        token_ids, num_prompt = self.sequence.token_ids, self.sequence.num_prompt_tokens
        while self.detokenizer is not None and num_prompt + self.num_taken < len(token_ids):
            self.num_taken += 1
            if num_prompt + self.num_taken == len(token_ids) and self.hides_last_token:
                return
            self._take(token_ids[num_prompt + self.num_taken - 1])
            if self.detokenizer is None:
                del token_ids[num_prompt + self.num_taken :]

    def _take(self, token_id: int) -> None:
        assert self.detokenizer is not None
        self.text += self.detokenizer.push(token_id)
        if self.num_taken < self.sequence.params.min_tokens:
            self.num_searched = len(self.text)
            return
        found = [(self.text.find(stop, self.num_searched), stop) for stop in self.stop]
        found = [(place, stop) for place, stop in found if place >= 0]
        if found:
            place, stop = min(found)
            self.text = self.text[: place + len(stop) if self.include_stop else place]
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
        if self.tokenizer is None:
            return ""
        token_ids = self.sequence.output_token_ids[: -1 if self.hides_last_token else None]
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    @property
    def hides_last_token(self) -> bool:
        """Whether the last token is a stop token that ended the sequence, and no part of the text."""
        sequence = self.sequence
        ended_by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
        return ended_by_token and sequence.token_ids[-1] in sequence.stop_token_ids and not self.include_stop
