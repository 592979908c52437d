"""The errors that a user can cause. Their text is one sentence: what was wrong and what would be right.

Everything that goes wrong for another reason is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

MOST_COMPARED = 80  # letters of a name
MOST_SHOWN = 500  # characters of a value in a message
SHORTENED = reprlib.Repr()  # for long lists, of which all the rest is not even written


class NanoflowError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(NanoflowError, ValueError):
    """An option, a key or a value that cannot be used."""


class CheckpointError(NanoflowError):
    """A checkpoint that is missing, corrupt, incomplete or of an unknown architecture."""


class PluginError(NanoflowError):
    """A plugin that is unknown, broken, duplicated or unable to serve here."""


class RequestError(NanoflowError, ValueError):
    """A prompt or a sampling parameter that cannot be served. Other requests are unharmed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name[:MOST_COMPARED], list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value as a message shows it: in one line of bounded length, whatever its own `repr` does."""
    kind = type(value).__name__
    try:
        is_long = isinstance(value, list | tuple | dict | set) and len(value) > 99
        text = SHORTENED.repr(value) if is_long else repr(value)
    except Exception:  # integers of thousands of digits, lists nested thousands deep, strange objects
        return f"a {kind} that can't be shown"
    if " at 0x" in text:
        return f"a {kind}"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def one_line(error: BaseException) -> str:
    """The class of an error that is not meant for the user, and its message in one line without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
