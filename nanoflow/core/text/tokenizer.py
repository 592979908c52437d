"""Text <-> token ids: the checkpoint's tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.byte_fallback import REPLACEMENT
from nanoflow.core.text.chat_template import render
from nanoflow.core.text.vocabulary import Vocabulary

NUM_CONTEXT = 8  # tokens of a prompt, on which the text of the first one after it may depend


class Tokenizer(Vocabulary):
    """A Hugging Face tokenizer, reduced to what the engine needs."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, special tokens added as the tokenizer does; or of what goes on with one, with none.

        Raises:
            RequestError: the text is not valid Unicode, or too long.
        """
        return self._encode("The prompt", text, add_special_tokens)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. A byte that is no part of a character is a replacement character, and spoils no other."""
        return self.decode_all([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def decode_all(self, lists: list[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each list, in one call; other threads may run meanwhile, if the tokenizer is a compiled one."""
        if not self.is_fast:
            options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
            return [self.hf.decode(token_ids, **options) for token_ids in lists]
        if self.fallback is not None and self.fallback.has_bytes(lists):
            dropped = self.special_ids if skip_special_tokens else frozenset()
            return self.fallback.decode_all(lists, dropped, self._anchor)
        return self.hf.backend_tokenizer.decode_batch(lists, skip_special_tokens=skip_special_tokens)

    def context(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> list[int]:
        """The last tokens of a prompt, on which the text of what follows may depend; none if it never does.

        Their text ends with a whole character, which nothing that follows can change.
        """
        if self.is_context_free:
            return []
        hidden = self.special_ids if skip_special_tokens else ()
        context = list(islice((token_id for token_id in reversed(token_ids) if token_id not in hidden), NUM_CONTEXT))
        context.reverse()
        while context and self.decode(context, skip_special_tokens=skip_special_tokens).endswith(REPLACEMENT):
            context.pop()
        return context

    def token_text(self, token_id: int) -> str:
        """Text of one token, a special one too, as it is within a text: with its space, if it has one."""
        if token_id not in self.token_texts:
            text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
            self.token_texts[token_id] = text[len(self._anchor) :]
        return self.token_texts[token_id]

    def word_token_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of each word as it is written at the beginning of a text and, if that differs, after a space.

        Raises:
            RequestError: a word is not valid Unicode.
        """
        result: list[list[int]] = []
        for word in words:
            ways = [self._encode("The bad word", space + word.lstrip(), False) for space in ("", " ")]
            result += ways[: 1 + (ways[0] != ways[1])]
        return result

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The conversation as the chat template writes it; see `chat_template.render`."""
        return render(self.hf, messages, **options)

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation, whose special tokens the template has written already."""
        return self._encode("The conversation", rendered, False)

    def _encode(self, what: str, text: str, add_special_tokens: bool) -> list[int]:
        if self.max_bytes is not None and len(text) > self.max_bytes // 4:
            num_bytes = len(text.encode(errors="replace"))
            if num_bytes > self.max_bytes:
                raise RequestError(
                    f"{what} has {num_bytes} bytes, but at most {self.max_bytes} are allowed; shorten it, or raise "
                    f"engine.max_prompt_bytes."
                )
        try:
            return self.hf.encode(str.__str__(text), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):
            raise RequestError(f"{what} {text!r:.60} is not valid Unicode; leave out lone surrogates.") from None
