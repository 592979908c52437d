"""What prompts may be: from texts and token ids of vLLM, transformers, NumPy and PyTorch to what `encode` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.fields import plain


class TextPrompt(TypedDict):
    """A prompt in words."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids: a list, or an array of one dimension."""

    prompt_token_ids: list[int]


def listed(prompts: Any, name: str) -> list[Any]:
    """One prompt, or several, as several, in Python's own types.

    Args:
        prompts: a text, token ids (a list, or an array of NumPy or PyTorch of one dimension), `{"prompt": text}`,
            `{"prompt_token_ids": ids}`, a list of these, or what a tokenizer of transformers returns for one or several
            texts (`{"input_ids": ..., "attention_mask": ...}`).
        name: what messages call them.

    Raises:
        RequestError: it is none of these.
    """
    if is_encoding(prompts):
        return _rows(prompts)
    if hasattr(type(prompts), "tolist"):
        return [_ids_in(prompts, name)]
    if isinstance(prompts, str | Mapping):
        return [one(prompts, 0)]
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"{name} must be a text, token ids, or a list of these, got {type(prompts).__name__}.")
    items = plain(prompts) if prompts and _is_number(prompts[0]) else prompts
    if items and all(isinstance(item, int) for item in items):
        return [list(items)]
    return [one(item, index) for index, item in enumerate(items)]


def one(prompt: Any, index: int) -> Any:
    """One prompt in Python's own types; messages call it prompt `index`.

    Raises:
        RequestError: an array that holds no token ids, or an encoding of several texts.
    """
    name = f"Prompt {index}"
    if is_encoding(prompt):
        rows = _rows(prompt)
        if len(rows) != 1:
            raise RequestError(f"{name} must be one prompt, but the tokenizer was given {len(rows)} texts for it.")
        return rows[0]
    if isinstance(prompt, Mapping):
        return {key: _ids_in(value, name) if key == "prompt_token_ids" else value for key, value in prompt.items()}
    return _ids_in(prompt, name)


def is_encoding(prompts: Any) -> bool:
    """Whether this is what a tokenizer of transformers returns, for one text or several."""
    return isinstance(prompts, Mapping) and "input_ids" in prompts


def _rows(encoding: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of each text in an encoding, without padding."""
    rows, masks = plain(encoding["input_ids"]), plain(encoding.get("attention_mask"))
    if not isinstance(rows, list | tuple) or not rows or not isinstance(rows[0], list | tuple):
        rows, masks = [rows], None if masks is None else [masks]
    try:
        if masks is None:
            return [list(row) for row in rows]
        return [
            [token_id for token_id, is_kept in zip(row, mask, strict=True) if is_kept]
            for row, mask in zip(rows, masks, strict=True)
        ]
    except Exception:  # whatever comparing such values raises
        raise RequestError("input_ids and attention_mask must be rows of equal lengths, one for each text.") from None


def _ids_in(value: Any, name: str) -> Any:
    """A list for an array, or for a list with numbers of NumPy in it; other values as they are."""
    if isinstance(value, list | tuple):
        return plain(value)
    if isinstance(value, str) or not hasattr(type(value), "tolist"):
        return value
    shape, ids = tuple(getattr(value, "shape", ())), plain(value)
    if not isinstance(ids, list) or len(shape) > 1:
        raise RequestError(
            f"{name} must be token ids in an array of one dimension, got one of shape {list(shape)}; give a list of "
            f"rows for several prompts."
        )
    if any(type(item) is not int for item in ids):
        raise RequestError(f"{name} must be token ids, which are integers, got an array of {type(ids[0]).__name__}.")
    return ids


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(type(value), "tolist") and not getattr(value, "shape", ()))
