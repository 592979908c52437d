"""The errors that a user can cause. Their text is one sentence: what was wrong and what would be right.

Everything that goes wrong for another reason is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value as a message shows it; Python refuses to write integers of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"a {type(value).__name__} of too many digits"


def one_line(error: BaseException) -> str:
    """The class of an error that is not meant for the user, and its message in one line without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
