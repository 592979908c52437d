"""Stop strings in the step loop: they end a sequence at the very token that completes one."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.text.detokenizer import IncrementalDetokenizer, extend_all
from nanoflow.core.text.stop_strings import StopStrings
from nanoflow.core.text.tokenizer import Tokenizer


@dataclass(slots=True)
class WatchedText:
    """The text of a sequence's output as far as it is known.

    Attributes:
        detokenizer: makes it.
        stop_strings: holds it.
        num_taken: tokens of prompt and output whose text was taken.
        stop_tokens: by id those stop strings that are special tokens, whose texts are not in the text.
    """

    detokenizer: IncrementalDetokenizer
    stop_strings: StopStrings
    num_taken: int
    stop_tokens: dict[int, str]


class StopChecker:
    """Makes the text of sequences that have stop strings, as their tokens come, and ends them where one is complete.

    No other text is made in the step loop: that of all other requests is decoded behind it.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[str, WatchedText] = {}  # by sequence id

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has stop strings."""
        params = sequence.params
        if params.stop and self.tokenizer is not None:
            self.texts[sequence.request_id] = WatchedText(
                IncrementalDetokenizer(
                    self.tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    prompt_token_ids=sequence.token_ids,
                ),
                StopStrings(params.stop, include=params.include_stop_str_in_output),
                sequence.num_prompt_tokens,
                self._stop_tokens(params),
            )

    def _stop_tokens(self, params: SamplingParams) -> dict[int, str]:
        if self.tokenizer is None or not params.skip_special_tokens:
            return {}
        special = self.tokenizer.special_tokens
        return {special[stop]: stop for stop in params.stop if stop in special}

    def forget(self, sequence: Sequence) -> None:
        """Watch it no more."""
        self.texts.pop(sequence.request_id, None)

    def check(self, sequences: list[Sequence]) -> None:
        """Take new tokens of watched sequences; ends those, without what follows, in which a stop string is complete.

        A stop string counts from the first token after `min_tokens` on, and text before that can't be part of one. One
        that is a special token's text is complete with that token, whose text need not be shown.
        """
        while sequences:  # a token of each at a time
            sequences = [sequence for sequence in sequences if self._has_more(sequence)]
            watched = [self.texts[sequence.request_id] for sequence in sequences]
            pieces = extend_all(
                (text.detokenizer, sequence.token_ids[text.num_taken : text.num_taken + 1], False)
                for sequence, text in zip(sequences, watched, strict=True)
            )
            for sequence, text, piece in zip(sequences, watched, pieces, strict=True):
                text.num_taken += 1
                num_output = text.num_taken - sequence.num_prompt_tokens
                counts = num_output >= sequence.params.min_tokens
                found = text.stop_strings.add(piece, counts=counts)
                if found is None and counts and (last := sequence.token_ids[text.num_taken - 1]) in text.stop_tokens:
                    text.stop_strings.add(text.detokenizer.push([], is_end=True))
                    found = text.stop_strings.end(text.stop_tokens[last])
                if found is not None:
                    del sequence.token_ids[text.num_taken :]
                    sequence.finish("stop", found)

    def _has_more(self, sequence: Sequence) -> bool:
        """Whether tokens are left whose text has to be looked at."""
        text, length = self.texts[sequence.request_id], len(sequence.token_ids)
        return text.num_taken < length - (text.num_taken == length - 1 and sequence.hides_last_token)

    def delta(self, sequence: Sequence) -> str | None:
        """Text that can be shown since the last call; None for a sequence that is not watched.

        What may yet become a stop string is held back until the sequence has ended.
        """
        text = self.texts.get(sequence.request_id)
        if text is None:
            return None
        if sequence.is_finished and text.stop_strings.found is None:
            text.stop_strings.text += text.detokenizer.push([], is_end=True)
        return text.stop_strings.delta(is_end=sequence.is_finished)
