"""Messages of a conversation as callers give them, checked, and as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.core.config.errors import RequestError, shown

SHAPE = "{'role': ..., 'content': ...}"
TEXT_PART = "{'type': 'text', 'text': ...}"
TEXT_TYPES = ("text", "input_text", "output_text")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with plain texts in them: a content is a text, None, or a list of text parts.

    Raises:
        RequestError: they are no conversation, or hold something else than text, such as an image.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages must be a list of {SHAPE}.")
    return [_checked_message(message, index) for index, message in enumerate(messages)]


def has_parts(messages: list[dict[str, Any]]) -> bool:
    """Whether a content is a list of parts."""
    return any(isinstance(message.get("content"), list) for message in messages)


def with_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the parts of each content joined to one text, a line or more each."""
    return [_changed(message, list, lambda parts: "\n".join(part["text"] for part in parts)) for message in messages]


def with_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with each content a list of parts."""
    return [_changed(message, str, lambda text: [{"type": "text", "text": text}]) for message in messages]


def _changed(message: dict[str, Any], kind: type, change: Any) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": change(content)} if isinstance(content, kind) else message


def _checked_message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"Message {index} must be {SHAPE}, got {shown(message):.60}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"The role of message {index} must be a text such as 'user', got {shown(role):.60}.")
    if isinstance(content, list | tuple):
        content = [_checked_part(part, index, place) for place, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"The content of message {index} must be a text or a list of {TEXT_PART}, got {shown(content):.60}."
        )
    changes = {"role": _plain_text(role)} | ({"content": _plain_text(content)} if "content" in message else {})
    return {**message, **changes}


def _checked_part(part: Any, index: int, place: int) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": _plain_text(part)}
    kind = part.get("type") if isinstance(part, Mapping) else part
    text = part.get("text") if isinstance(part, Mapping) and kind in TEXT_TYPES else None
    if not isinstance(text, str):
        raise RequestError(
            f"Part {place} of the content of message {index} must be {TEXT_PART}, since only text is served, got "
            f"{shown(kind if kind not in TEXT_TYPES else part):.60}."
        )
    return {"type": "text", "text": _plain_text(text)}


def _plain_text(value: Any) -> Any:
    """A text of a subclass of `str`, such as NumPy's, as one of `str`; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value
