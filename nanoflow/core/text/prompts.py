"""From what callers give, texts, token ids and conversations, to token ids."""

from __future__ import annotations

from typing import Any, TypeAlias

from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.chat_messages import plain
from nanoflow.core.text.tokenizer import Tokenizer

Prompt: TypeAlias = "str | list[int] | dict[str, Any]"
Message: TypeAlias = "dict[str, Any]"


def encode(tokenizer: Tokenizer | None, prompt: Prompt, index: int = 0) -> tuple[str | None, list[int]]:
    """A prompt's text, if it has one, and its token ids.

    Raises:
        RequestError: it is neither; the message calls it prompt `index`.
    """
    text, token_ids = prompt, prompt
    if isinstance(prompt, dict):
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if isinstance(text, str):
        text = plain(text)
        return text, needed(tokenizer, "a prompt in words needs").encode(text)
    if not isinstance(token_ids, list | tuple) or not all(
        issubclass(kind, int) and kind is not bool for kind in set(map(type, token_ids))
    ):
        raise RequestError(f"Prompt {index} must be a text or a list of token ids, got {prompt!r:.60}.")
    return None, list(token_ids)


def encode_chats(
    tokenizer: Tokenizer | None, messages: list[Message] | list[list[Message]], **template: Any
) -> list[tuple[str, list[int]]]:
    """A conversation, or each of a list of them, as the chat template writes it, and the token ids of that.

    Args:
        tokenizer: of the checkpoint.
        messages: `{"role": ..., "content": ...}` in the order in which they were said; a content is a text or a list
            of `{"type": "text", "text": ...}`.
        template: as in `Tokenizer.render_chat`.

    Raises:
        RequestError: there is no chat template, or it refuses the messages.
    """
    tokenizer = needed(tokenizer, "chat() needs")
    if not isinstance(messages, list | tuple) or not messages or not isinstance(messages[0], list | tuple):
        return [encode_chat(tokenizer, messages, **template)]
    found = []
    for index, conversation in enumerate(messages):
        try:
            found.append(encode_chat(tokenizer, conversation, **template))
        except RequestError as error:
            raise RequestError(f"Conversation {index}: {error}") from error
    return found


def encode_chat(tokenizer: Tokenizer | None, messages: list[Message], **template: Any) -> tuple[str, list[int]]:
    """`encode_chats` of one conversation."""
    tokenizer = needed(tokenizer, "chat() needs")
    text = tokenizer.render_chat(messages, **template)
    return text, tokenizer.encode_chat(text)


def needed(tokenizer: Tokenizer | None, wish: str) -> Tokenizer:
    """The tokenizer, or the error that there is none."""
    if tokenizer is None:
        raise RequestError(f"The checkpoint has no tokenizer, which {wish}; give the prompt as token ids.")
    return tokenizer
