"""Ctrl-C between steps: an exception in the middle of one would leave the engine half done."""

from __future__ import annotations

import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts(patience: float | None = None) -> Iterator[Callable[[], None]]:
    """Holds a Ctrl-C back until the end of the block, where what handled it before does so: `KeyboardInterrupt`.

    The block gets a function to call where it may end before that. A second Ctrl-C is not held back, so that a block
    that hangs can be left; nor is the first one for more than `patience` seconds. Signals come to the main thread
    alone: elsewhere, and where Ctrl-C is ignored, nothing is done.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    if not callable(before):
        yield lambda: None
        return
    caught: list[int] = []
    timers: list[threading.Timer] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if caught:
            before(number, frame)
        else:
            caught.append(number)
            if patience is not None:
                timers.append(threading.Timer(patience, interrupt_main))
                timers[-1].daemon = True
                timers[-1].start()

    def check() -> None:
        if caught:
            before(caught.pop(), None)

    signal.signal(signal.SIGINT, catch)
    try:
        yield check
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)
        check()
