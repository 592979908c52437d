"""Ctrl-C between steps: an exception in the middle of one would leave the engine half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Holds a Ctrl-C back until the end of the block, where what handled it before does so: `KeyboardInterrupt`.

    The block gets a function to call where it may end before that. A second Ctrl-C is not held back, so that a block
    that hangs can be left. Signals come to the main thread alone: elsewhere, and where Ctrl-C is ignored, nothing is
    done.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    if not callable(before):
        yield _nothing
        return
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if caught:
            before(number, frame)
        else:
            caught.append(number)

    def check() -> None:
        if caught:
            before(caught.pop(), None)

    signal.signal(signal.SIGINT, catch)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
        check()


def _nothing() -> None:
    pass
