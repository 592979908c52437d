"""Text <-> token ids: the checkpoint's tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import CheckpointError, RequestError, one_line
from nanoflow.core.config.files import check_is_file

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

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; that of a special token too."""
        if token_id not in self.token_texts:
            self.token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
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

    def decode_all(self, lists: list[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Text of each list of token ids. Other threads may run meanwhile, where the tokenizer is a compiled one."""
        if self.hf.is_fast:
            return self.hf.backend_tokenizer.decode_batch(lists, skip_special_tokens=skip_special_tokens)
        return [self.decode(token_ids, skip_special_tokens=skip_special_tokens) for token_ids in lists]

    def render_chat(
        self, messages: list[dict[str, Any]], *, tools: list[Any] | None = None, chat_template: str | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The conversation as the chat template writes it, which runs in Jinja's sandbox, as transformers does it.

        Args:
            messages: `{"role": ..., "content": ...}` in the order in which they were said.
            tools: what the model may call: JSON schemas, or functions with type hints and docstrings.
            chat_template: a Jinja template in place of the checkpoint's.
            add_generation_prompt: end where the assistant begins to speak.
            continue_final_message: end within the last message, which the model goes on with.
            chat_template_kwargs: more variables of the template, such as `enable_thinking`.

        Raises:
            RequestError: there is no chat template, or it refuses the messages.
        """
        if not (chat_template or self.hf.chat_template):
            raise RequestError("The checkpoint has no chat template; use generate() with a prompt instead of chat().")
        if add_generation_prompt and continue_final_message:
            raise RequestError("continue_final_message needs add_generation_prompt=False; one of the two is the end.")
        try:
            return self.hf.apply_chat_template(
                messages, tools=tools, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tokenize=False, **(chat_template_kwargs or {}),
            )  # fmt: skip
        except Exception as error:  # whatever the template, a program of the checkpoint's, raises
            raise RequestError(f"The chat template does not take these messages: {error}") from error

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation, whose special tokens the template has written already."""
        return self._encode("The conversation", rendered, False)

    def _encode(self, what: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.hf.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):
            raise RequestError(f"{what} {text!r:.60} is not valid Unicode; leave out lone surrogates.") from None
