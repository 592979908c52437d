"""What is known of a checkpoint's tokenizer before it has seen a text: its kind, and its special tokens."""

from __future__ import annotations

import string
from functools import cached_property
from itertools import islice
from typing import Any

from nanoflow.core.text.byte_fallback import ByteFallback, decoder_kinds


class Vocabulary:
    """The facts that `Tokenizer` goes by.

    Attributes:
        is_fast: whether it is one of the tokenizers library, which tells the bytes of each token.
        is_context_free: whether a token has the same bytes at the start of a text as after others, as byte-level ones.
        fallback: how bytes are decoded that some characters fall back to; None if there are none.
        max_bytes: longer prompts are refused before they are tokenized, which would take long; None for no limit.
        token_texts: of tokens that were asked about one by one.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer
        self.is_fast = bool(hf_tokenizer.is_fast)
        decoder = decoder_kinds(hf_tokenizer.backend_tokenizer) if self.is_fast else []
        self.is_context_free = decoder == ["ByteLevel"]
        self.fallback = ByteFallback(hf_tokenizer.backend_tokenizer) if "ByteFallback" in decoder else None
        self.max_bytes: int | None = None
        self.token_texts: dict[int, str] = {}

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence id."""
        return self.hf.eos_token_id

    def longest_token(self) -> int:
        """Bytes of the longest name in the vocabulary, which are no fewer than those of the text that it stands for."""
        return max((len(name.encode(errors="replace")) for name in self.hf.get_vocab()), default=1)

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
