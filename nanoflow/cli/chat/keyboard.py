"""What a person types: messages of one or several lines, with a history that outlives the session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = '"""'  # begins and ends a message of several lines
GO_ON = "\\"  # at the end of a line: the next one belongs to it
PROMPT, MORE = "> ", ". "
MOST_LINES = 1000  # of the history


def message() -> str:
    """The next message.

    Raises:
        EOFError: there is none.
        KeyboardInterrupt: what was typed of it is dropped.
    """
    line = input(PROMPT).strip()
    if line.startswith(BLOCK):
        return _block(line.removeprefix(BLOCK))
    lines = [line]
    while lines[-1].endswith(GO_ON):
        lines[-1] = lines[-1].removesuffix(GO_ON)
        lines.append(_more(""))
    return "\n".join(lines).strip()


def _block(line: str) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(_more(BLOCK))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip()


def _more(at_end: str) -> str:
    """Another line, or `at_end` where the input ends, so that the message ends, too."""
    try:
        return input(MORE)
    except EOFError:
        return at_end


def history_file() -> Path:
    """Where the history is kept: in the user's folder for the state of programs."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "nanoflow" / "chat_history"


@contextmanager
def history() -> Iterator[None]:
    """A line editor for `input`, with the lines of earlier sessions; without any where there is no file for them."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    with suppress(OSError, RuntimeError):  # the latter: nobody knows where the home is
        readline.read_history_file(history_file())
    try:
        yield
    finally:
        with suppress(OSError, RuntimeError):
            path = history_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(MOST_LINES)
            readline.write_history_file(path)
