"""The text of a request's output, and the stop strings in it."""

from __future__ import annotations

from nanoflow.core.tokenizer import IncrementalDetokenizer, Tokenizer
from nanoflow.core.types import Sequence


class OutputText:
    """Text of one sequence's output. It is followed token by token only where stop strings have to be found.

    Args:
        tokenizer: None leaves the text empty, and so does `SamplingParams.detokenize` where it is false.
        sequence: whose output it is.
        prompt: the prompt's text, kept for the request's output.
    """

    def __init__(self, tokenizer: Tokenizer | None, sequence: Sequence, prompt: str | None) -> None:
        params = sequence.params
        self.tokenizer = tokenizer if params.detokenize else None
        self.sequence = sequence
        self.prompt = prompt
        self.stop = params.stop or []
        self.include_stop = params.include_stop_str_in_output
        self.skip_special_tokens = params.skip_special_tokens
        self.detokenizer: IncrementalDetokenizer | None = None
        if self.tokenizer and self.stop:
            self.detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=self.skip_special_tokens)
        self.text = ""
        self.num_searched = 0  # characters in which no stop string begins any more

    def update(self) -> None:
        """Take the sequence's newest token; ends the sequence if a stop string is complete.

        A stop string counts from the first token after `min_tokens` on, and text before that can't be part of one.
        """
        if self.detokenizer is None or self._hides_last_token:
            return
        self.text += self.detokenizer.push(self.sequence.token_ids[-1])
        if len(self.sequence.token_ids) - self.sequence.num_prompt_tokens < self.sequence.params.min_tokens:
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

    def final(self) -> str:
        """The whole text, once the sequence has ended."""
        if self.stop:
            return self.text + (self.detokenizer.flush() if self.detokenizer else "")
        if self.tokenizer is None:
            return ""
        token_ids = self.sequence.output_token_ids[: -1 if self._hides_last_token else None]
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    @property
    def _hides_last_token(self) -> bool:
        """Whether the last token is a stop token that ended the sequence, and no part of the text."""
        ended_by_token = self.sequence.finish_reason == "stop" and not isinstance(self.sequence.stop_reason, str)
        return ended_by_token and not self.include_stop
