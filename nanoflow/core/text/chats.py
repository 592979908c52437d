"""From conversations to token ids, through the chat template."""

from __future__ import annotations

from typing import Any, TypeAlias

from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.prompts import needed
from nanoflow.core.text.tokenizer import Tokenizer

Message: TypeAlias = "dict[str, Any]"


def encode_chats(
    tokenizer: Tokenizer | None, messages: list[Message] | list[list[Message]], **template: Any
) -> list[tuple[str, list[int]]]:
    """A conversation, or each of a list of them, as the chat template writes it, and the token ids of that.

    Args:
        tokenizer: of the checkpoint.
        messages: `{"role": ..., "content": ...}` in the order in which they were said; a content is a text or a list
            of `{"type": "text", "text": ...}`.
        template: as in `chat_template.render`.

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
