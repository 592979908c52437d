"""Ctrl-C between steps: an exception in the middle of one would leave the engine half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Holds a Ctrl-C back until the end of the block, where what handled it before does so: `KeyboardInterrupt`.

    A second one is not held back, so that a block that hangs can be left. Signals come to the main thread alone; in
    others, and where Ctrl-C is ignored, nothing is done.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(caught) == 1:
            before(caught[0], None)
