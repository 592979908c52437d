"""Text <-> token ids: the checkpoint's tokenizer and its chat template."""

from __future__ import annotations

import string
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError, RequestError, one_line
from nanoflow.core.config.files import check_is_file
from nanoflow.core.text.byte_fallback import byte_values, decoder_kinds, split_at_strays
from nanoflow.core.text.chat_messages import plain
from nanoflow.core.text.chat_template import render

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_CONTEXT = 8  # tokens of a prompt, on which the text of the first one after it may depend
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """A Hugging Face tokenizer, reduced to what the engine needs."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer
        self.token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in a checkpoint's folder; None if it has none, so that only token ids can be its prompts.

        Raises:
            CheckpointError: there is one, but it can't be read.
        """
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
        if not files:
            return None
        for file in files:
            check_is_file(file)
        from transformers import AutoTokenizer

        try:
            # Without the last one, transformers asks on standard input whether to run code that the checkpoint brings.
            return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"The tokenizer in {folder} needs code that the checkpoint brings, which is never run; "
                    f"use a checkpoint with a tokenizer that transformers knows."
                ) from None
            raise CheckpointError(f"The tokenizer in {folder} can't be loaded ({one_line(error):.300}).") from error

    @property
    def is_fast(self) -> bool:
        """Whether it is one of the tokenizers library, which tells the bytes of each token."""
        return bool(self.hf.is_fast)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence id."""
        return self.hf.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, special tokens added as the tokenizer does; or of what goes on with one, with none.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        return self._encode("The prompt", text, add_special_tokens)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of special tokens by their texts: those that `skip_special_tokens` leaves out."""
        known = self.hf.added_tokens_decoder.items()
        return {token.content: token_id for token_id, token in known if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of `special_tokens`."""
        return frozenset(self.special_tokens.values())

    @cached_property
    def is_context_free(self) -> bool:
        """Whether a token has the same bytes at the start of a text as after others, as byte-level ones do."""
        return self.is_fast and decoder_kinds(self.hf.backend_tokenizer) == ["ByteLevel"]

    @cached_property
    def _byte_values(self) -> dict[int, int]:
        return byte_values(self.hf.backend_tokenizer) if self.is_fast else {}

    @cached_property
    def _anchor(self) -> list[int]:
        """A token to put before others so that they don't begin a text; empty if none is needed, or fits."""
        if not self.is_fast or self.is_context_free:
            return []
        backend = self.hf.backend_tokenizer
        found = ((letter, backend.token_to_id(letter)) for letter in string.ascii_letters)
        fitting = (
            token_id for letter, token_id in found if token_id is not None and backend.decode([token_id]) == letter
        )
        return list(islice(fitting, 1))

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. A byte that is no part of a character is a replacement character, and spoils no other."""
        return self.decode_all([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def decode_all(self, lists: list[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each list, in one call; other threads may run meanwhile, if the tokenizer is a compiled one."""
        if not self.is_fast:
            options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
            return [self.hf.decode(token_ids, **options) for token_ids in lists]
        if not self._byte_values or all(self._byte_values.keys().isdisjoint(token_ids) for token_ids in lists):
            return self._decoded(lists, skip_special_tokens)
        return self._decoded_with_bytes(lists, skip_special_tokens)

    def _decoded(self, lists: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return self.hf.backend_tokenizer.decode_batch(lists, skip_special_tokens=skip_special_tokens)

    def _decoded_with_bytes(self, lists: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """`decode_all` of lists with bytes, some of which may belong to no character."""
        backend = self.hf.backend_tokenizer

        def is_dropped(token_id: int) -> bool:
            return (skip_special_tokens and token_id in self.special_ids) or backend.id_to_token(token_id) is None

        split = [split_at_strays(token_ids, self._byte_values, is_dropped) for token_ids in lists]
        flat = [self._anchor * (place > 0) + part for parts in split for place, part in enumerate(parts)]
        texts = iter(self._decoded(flat, skip_special_tokens))
        cut = len(self._anchor)  # a letter
        return [REPLACEMENT.join(next(texts)[cut * (place > 0) :] for place in range(len(parts))) for parts in split]

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

    def render_chat(
        self, messages: list[dict[str, Any]], *, tools: list[Any] | None = None, chat_template: str | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The conversation as the chat template writes it, which runs in Jinja's sandbox, as transformers does it.

        Args:
            messages: `{"role": ..., "content": ...}` in the order in which they were said. A content may be a list of
                `{"type": "text", "text": ...}`, which are joined by newlines, unless the template takes such lists
                only.
            tools: what the model may call: JSON schemas, or functions with type hints and docstrings.
            chat_template: a Jinja template in place of the checkpoint's.
            add_generation_prompt: end where the assistant begins to speak.
            continue_final_message: end within the last message, which the model goes on with.
            chat_template_kwargs: more variables of the template, such as `enable_thinking`.

        Raises:
            RequestError: there is no chat template, or it refuses the messages, takes too long or writes too much.
        """
        return render(
            self.hf, messages, tools=tools, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, chat_template_kwargs=chat_template_kwargs,
        )  # fmt: skip

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation, whose special tokens the template has written already."""
        return self._encode("The conversation", rendered, False)

    def _encode(self, what: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.hf.encode(plain(text), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):
            raise RequestError(f"{what} {text!r:.60} is not valid Unicode; leave out lone surrogates.") from None
