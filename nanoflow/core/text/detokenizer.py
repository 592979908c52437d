"""Text of token ids that come one after the other: an incremental detokenizer for each output."""

from __future__ import annotations

from collections.abc import Iterable

from nanoflow.core.text.tokenizer import REPLACEMENT, Tokenizer

LONGEST_CHARACTER = 4  # bytes, and so tokens
LONGEST_PENDING = 24  # tokens whose text is looked at once more, while it does not end with a whole character
NUM_KEPT = 16  # of those with text, where none of them can become a character any more


class IncrementalDetokenizer:
    """Text of a growing list of token ids, in pieces that never end within a character.

    The pieces joined are the text of all ids after those of the prompt, whatever the ids are. A window of tokens is
    decoded at a time, and the part before it is settled (the method of text-generation-inference), because some
    tokenizers write a token differently at the start of a text. So the window begins with the last tokens of the
    prompt. An unfinished character decodes to replacement characters: those at the end are held back until more tokens
    complete them. The window is bounded: a character has at most four bytes, so what can't be one after that is given
    out as it is.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave their texts out.
        prompt_token_ids: what comes before the text.

    Attributes:
        window: ids whose text is looked at: some whose text was given out, then those that are pending.
        num_context: how many of them came before the pending ones.
        num_emitted: characters of the window's text that were given out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: list[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.window = tokenizer.context(prompt_token_ids or [], skip_special_tokens=skip_special_tokens)
        self.num_context = len(self.window)
        self.num_emitted = len(self._decoded_all([self.window])[0]) if self.window else 0

    def push(self, token_ids: list[int], *, is_end: bool = False) -> str:
        """Take more ids; returns the text that is settled by them. At the end, all that was held back is."""
        return extend_all([(self, token_ids, is_end)])[0]

    def windows(self, token_ids: list[int], is_end: bool) -> list[list[int]]:
        """Take more ids; returns lists of ids whose texts `settle` wants: the window, and its pending part."""
        self.window += token_ids
        return [self.window] if is_end else [self.window, self.window[self.num_context :]]

    def settle(self, text: str, pending: str | None) -> str:
        """The text that is settled by the ids taken, given the texts of what `windows` returned.

        The two are apart so that many texts can be decoded in one call.
        """
        if pending is None:
            return text[self.num_emitted :]
        settled = self._num_settled(text)
        num_pending = len(self.window) - self.num_context
        if settled < len(text) and num_pending > LONGEST_PENDING:
            return self._settle_long(text)
        piece = text[self.num_emitted : settled]
        self.num_emitted += len(piece)
        if settled == len(text) and piece:  # all text is out: keep the newest ids as context for what follows
            del self.window[: self.num_context]
            self.num_context, self.num_emitted = len(self.window), len(pending)
        elif settled == len(text) and num_pending > LONGEST_PENDING:  # ids without any text, such as special tokens
            del self.window[self.num_context + 1 :]
        return piece

    def _settle_long(self, text: str) -> str:
        """What is settled of a text whose end has long been no whole character."""
        for num_tokens in range(1, LONGEST_CHARACTER):  # the last tokens may be the beginning of one
            (before,) = self._decoded_all([self.window[:-num_tokens]])
            if len(before) >= self.num_emitted and self._num_settled(before) == len(before):
                piece = before[self.num_emitted :]
                self.num_emitted += len(piece)
                return piece
        held_back = min(len(text) - self._num_settled(text), LONGEST_CHARACTER - 1)  # what may stand for one
        piece = text[self.num_emitted : len(text) - held_back]
        own_texts = self._decoded_all([[token_id] for token_id in self.window])
        self.window = [token_id for token_id, own in zip(self.window, own_texts, strict=True) if own][-NUM_KEPT:]
        self.num_context = 0
        self.num_emitted = len(self._decoded_all([self.window])[0]) - held_back
        return piece

    def _num_settled(self, text: str) -> int:
        """How many characters of the window's text can't change any more, if tokens at its end may be unfinished."""
        settled = len(text)
        while settled > self.num_emitted and text[settled - 1] == REPLACEMENT:
            settled -= 1
        return settled

    def _decoded_all(self, lists: list[list[int]]) -> list[str]:
        return self.tokenizer.decode_all(lists, skip_special_tokens=self.skip_special_tokens)


def extend_all(work: Iterable[tuple[IncrementalDetokenizer, list[int], bool]]) -> list[str]:
    """Hand each detokenizer its new ids; returns what each has to say, all decoded in one call of the tokenizer.

    Args:
        work: detokenizers of one tokenizer, each at most once; the ids; and whether these are its last ones.
    """
    texts: dict[int, str] = {}
    work = list(work)
    for skip in (True, False):  # special tokens
        chosen = [place for place, (one, _, _) in enumerate(work) if one.skip_special_tokens == skip]
        if not chosen:
            continue
        windows = [work[place][0].windows(*work[place][1:]) for place in chosen]
        tokenizer = work[chosen[0]][0].tokenizer
        flat = [window for some in windows for window in some]
        decoded = iter(tokenizer.decode_all(flat, skip_special_tokens=skip))
        for place, some in zip(chosen, windows, strict=True):
            texts[place] = work[place][0].settle(next(decoded), next(decoded) if len(some) > 1 else None)
    return [texts[place] for place in range(len(work))]
