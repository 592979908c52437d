r"""Double quotes in overrides as JSON and YAML have them: "\n" is a newline. Single quotes stay literal."""

from __future__ import annotations

import json
import re

# An escape outside quotes, a text in single quotes, one in double quotes: whatever comes first.
PIECES = re.compile(r"""\\.|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
UNICODE = r"u[0-9a-fA-F]{4}"
ESCAPE = re.compile(rf"\\({UNICODE}(?:\\{UNICODE})*|.)", re.DOTALL)
CHARACTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"'}
BEFORE_QUOTE = re.compile(r'(\\*)("|$)')


def unescaped(override: str) -> str:
    r"""`KEY=VALUE` with JSON's escapes within double quotes as the characters that they mean, for Hydra to read.

    What is no escape in JSON stays as it is, so that the pattern "\d" needs no second backslash.
    """
    key, equals, value = override.partition("=")
    return key + equals + PIECES.sub(lambda piece: _piece(piece[0]), value)


def one_line(override: str) -> str:
    r"""The other way round: `KEY=VALUE` with no line ends, as it may be written on a command line and in a table."""
    for name, character in (("n", "\n"), ("t", "\t"), ("r", "\r")):
        override = override.replace(character, f"\\{name}")
    return override


def _piece(piece: str) -> str:
    if not piece.startswith('"'):
        return piece
    text = ESCAPE.sub(lambda escape: _character(escape[1]), piece[1:-1])
    # Hydra takes backslashes as they are but before a quote, where each needs another one.
    return '"' + BEFORE_QUOTE.sub(lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), text) + '"'


def _character(escape: str) -> str:
    if len(escape) > 1:
        text = json.loads(f'"\\{escape}"')  # where two may make one character
        return text if text.encode(errors="ignore").decode() == text else f"\\{escape}"
    return CHARACTERS.get(escape, f"\\{escape}")
