"""From what callers give, texts or token ids, to token ids."""

from __future__ import annotations

from typing import Any, TypeAlias

from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.text.tokenizer import Tokenizer

Prompt: TypeAlias = "str | list[int] | dict[str, Any]"


def encode(tokenizer: Tokenizer | None, prompt: Prompt, index: int = 0) -> tuple[str | None, list[int]]:
    """A prompt's text, if it has one, and its token ids.

    Raises:
        RequestError: it is neither; the message calls it prompt `index`.
    """
    text, token_ids = prompt, prompt
    if isinstance(prompt, dict):
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if isinstance(text, str):
        text = str.__str__(text)  # a plain one of a subclass, such as NumPy's
        return text, needed(tokenizer, "a prompt in words needs").encode(text)
    if not isinstance(token_ids, list | tuple) or not all(
        issubclass(kind, int) and kind is not bool for kind in set(map(type, token_ids))
    ):
        raise RequestError(f"Prompt {index} must be a text or a list of token ids, got {shown(prompt):.60}.")
    return None, list(token_ids)


def needed(tokenizer: Tokenizer | None, wish: str) -> Tokenizer:
    """The tokenizer, or the error that there is none."""
    if tokenizer is None:
        raise RequestError(f"The checkpoint has no tokenizer, which {wish}; give the prompt as token ids.")
    return tokenizer
