"""Characters that a tokenizer falls back to bytes for, each byte a token such as `<0xE6>`, and bytes that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LENGTHS = ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF5, 4), (0x100, 0))  # of characters that begin below a byte


class ByteFallback:
    """Decodes bytes, some of which may belong to no character.

    Args:
        backend: a tokenizer of the tokenizers library whose decoder knows bytes.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        found = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.values = {token_id: byte for token_id, byte in found.items() if token_id is not None}

    def has_bytes(self, lists: list[list[int]]) -> bool:
        """Whether there is a byte in any of the lists of token ids."""
        return not all(self.values.keys().isdisjoint(token_ids) for token_ids in lists)

    def decode_all(self, lists: list[list[int]], dropped: frozenset[int], anchor: list[int]) -> list[str]:
        """The text of each list; a byte that is no part of a character is a replacement character.

        Args:
            lists: token ids.
            dropped: special tokens to leave out.
            anchor: the id of a letter, to put before tokens so that they don't begin a text; or none.
        """

        def is_dropped(token_id: int) -> bool:
            return token_id in dropped or self.backend.id_to_token(token_id) is None

        split = [split_at_strays(token_ids, self.values, is_dropped) for token_ids in lists]
        flat = [anchor * (place > 0) + part for parts in split for place, part in enumerate(parts)]
        texts = iter(self.backend.decode_batch(flat, skip_special_tokens=bool(dropped)))
        cut = len(anchor)
        return [REPLACEMENT.join(next(texts)[cut * (place > 0) :] for place in range(len(parts))) for parts in split]


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
        values: by token id the byte that it stands for.
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
