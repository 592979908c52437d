"""How far a template may go: templates are programs, and those of checkpoints are not to be trusted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from inspect import CO_GENERATOR
from types import FrameType
from typing import Any

LONGEST_TEMPLATE = 2**20  # characters
LONGEST_TEXT = 2**24  # characters that a template may write, or hold in a variable
LONGEST_TIME = 5.0  # seconds that it may take for it
PAUSE = 0.01  # seconds between two looks at a template's variables: memory for what is made meanwhile is there
TEMPLATE_FILE = "<template>"  # what Jinja calls the code that it makes of one


class TemplateLimit(Exception):
    """A template goes on for too long, or writes too much; the message says which."""


def bounded(render: Callable[[], str]) -> str:
    """What `render` returns, which runs Jinja templates.

    It runs in a thread of its own, where each line of a template is watched, and each text that one writes; so the
    caller's thread, which may have a debugger, is left alone. What can't be interrupted is a single expression.

    Raises:
        TemplateLimit: the template takes too long, or its text is too long.
        Exception: what `render` raises.
    """
    watch, result = _Watch(), []

    def run() -> None:
        sys.settrace(watch.enter)
        try:
            result.append((render(), None))
        except BaseException as error:
            result.append(("", error))
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run, name="nanoflow-chat-template", daemon=True)
    thread.start()
    thread.join()
    ((text, error),) = result
    if error is not None:
        raise error
    if len(text) > LONGEST_TEXT:
        raise _too_long()
    return text


class _Watch:
    """A trace function of the templates that run in one thread.

    Attributes:
        deadline: on the monotonic clock.
        next_look: at the variables, on the same clock.
        num_characters: that templates have written.
    """

    def __init__(self) -> None:
        now = time.monotonic()
        self.deadline = now + LONGEST_TIME
        self.next_look = now + PAUSE
        self.num_characters = 0

    def enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Watch a function if it is a template's."""
        return self.watch if frame.f_code.co_filename == TEMPLATE_FILE else None

    def watch(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Look at the clock, at what is written, and now and then at the variables."""
        now = time.monotonic()
        if now > self.deadline:
            raise TemplateLimit(f"it takes more than {LONGEST_TIME:g} seconds")
        if event == "return" and isinstance(arg, str) and frame.f_code.co_flags & CO_GENERATOR:
            self.num_characters += len(arg)
        if self.num_characters > LONGEST_TEXT:
            raise _too_long()
        if now > self.next_look:
            if any(_num_characters(value) > LONGEST_TEXT for value in frame.f_locals.values()):
                raise _too_long()
            end = time.monotonic()
            self.next_look = end + max(PAUSE, 10 * (end - now))
        return self.watch


def _num_characters(value: Any) -> int:
    """Of a text, or of a list of texts, such as a macro's output."""
    if isinstance(value, list):
        return sum(len(item) for item in value if isinstance(item, str))
    return len(value) if isinstance(value, str) else 0


def _too_long() -> TemplateLimit:
    return TemplateLimit(f"its text has more than {LONGEST_TEXT} characters")
