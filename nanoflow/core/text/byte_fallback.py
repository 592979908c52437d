"""Characters that a tokenizer falls back to bytes for, each byte a token such as `<0xE6>`, and bytes that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

LENGTHS = ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF5, 4), (0x100, 0))  # of characters that begin below a byte


def byte_values(backend: Any) -> dict[int, int]:
    """By token id the byte that it stands for, of a tokenizer of the tokenizers library; empty if it has none."""
    if "ByteFallback" not in decoder_kinds(backend):
        return {}
    found = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {token_id: byte for token_id, byte in found.items() if token_id is not None}


def decoder_kinds(backend: Any) -> list[str]:
    """What the decoder of a tokenizer of the tokenizers library is made of; empty if it has none."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in decoder.get("decoders", [decoder])]


def split_at_strays(
    token_ids: Iterable[int], values: dict[int, int], is_dropped: Callable[[int], bool]
) -> list[list[int]]:
    """The ids in parts, between which there was one byte each that belongs to no whole character.

    A decoder that meets such a byte gives up the whole run of bytes around it, finished characters included; and
    which run that is changes with what follows. Parts without strays mean the same whatever is beside them.

    Args:
        token_ids: of a text.
        values: of `byte_values`.
        is_dropped: whether the decoder leaves an id out, so that bytes before and after it are neighbours.
    """
    parts: list[list[int]] = [[]]
    run: list[int] = []
    for token_id in token_ids:
        if token_id in values:
            run.append(token_id)
        elif not is_dropped(token_id):
            _add_run(parts, run, values)
            run = []
            parts[-1].append(token_id)
    _add_run(parts, run, values)
    return parts


def _add_run(parts: list[list[int]], run: list[int], values: dict[int, int]) -> None:
    place, data = 0, bytes([values[token_id] for token_id in run])
    while place < len(run):
        length = _character_length(data[place : place + 4])
        if length:
            parts[-1] += run[place : place + length]
        else:
            parts.append([])
        place += length or 1


def _character_length(data: bytes) -> int:
    """Bytes of the character at the beginning of some; 0 if there is none."""
    length = next(length for end, length in LENGTHS if data[0] < end)
    try:
        return len(data[:length]) if len(data[:length].decode()) == 1 else 0
    except UnicodeDecodeError:
        return 0
