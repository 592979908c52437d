"""Several threads that use one engine take turns, a step long each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from nanoflow.core.api.interrupts import deferred_interrupts


class Turns:
    """Lets one thread at a time work with an engine, in the order in which they ask.

    Args:
        abort: ends a request of the engine; called within a turn.
    """

    def __init__(self, abort: Callable[[str], object]) -> None:
        self._abort = abort
        self._left: deque[str] = deque()  # requests that nobody waits for any more
        self._next = threading.Lock()  # whose turn is next waits with this for the other, so that nobody is passed by
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """A turn, for one who holds interrupts back. It can't be taken within another one of the same thread."""
        with self._next:
            self._lock.acquire()
        try:
            self._abort_left()
            yield
        finally:
            self._lock.release()
            self._abort_soon()

    def leave(self, request_ids: Iterable[str]) -> None:
        """Abort requests, at once or at the end of the turn that is going on; waits for nothing.

        So it may be called from anywhere, such as by the garbage collector in the middle of a step.
        """
        self._left.extend(request_ids)
        with deferred_interrupts():
            self._abort_soon()

    def _abort_soon(self) -> None:
        while self._left and self._lock.acquire(blocking=False):  # else whoever has the turn does it
            try:
                self._abort_left()
            finally:
                self._lock.release()

    def _abort_left(self) -> None:
        while self._left:
            self._abort(self._left.popleft())
