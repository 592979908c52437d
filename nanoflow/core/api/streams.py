"""Outputs on their way from the engine's threads to those who read them in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import NanoflowError, RequestError
from nanoflow.core.data.messages import Refusal
from nanoflow.core.data.outputs import RequestOutput

LONGEST_TURN = 0.1  # seconds to wait for an event loop that is busy, or has stopped


class Streams:
    """The streams of one event loop at a time, and what the engine's threads bring them.

    The threads know this, and not the `AsyncLLM`, so that one that nobody holds any more is freed.

    Args:
        cancel: ends a request of the engine; called with the name that the engine knows it by.

    Attributes:
        failure: the error that ended the engine; None while it works.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self.cancel = cancel
        self.failure: BaseException | None = None
        self.num_tokens = 0  # in the prompts of all streams
        self.by_name: dict[str, Stream] = {}  # by the names that the engine knows them by; the event loop's own
        self.names: dict[str, str] = {}  # of unfinished streams, by the callers' ids
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, name: str, stream: Stream) -> None:
        """Expect outputs for a stream of the running event loop."""
        if stream.request_id in self.names:
            raise RequestError(f"There is an unfinished request {stream.request_id!r} already; ids must differ.")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self.by_name and self._loop is not None and not self._loop.is_closed():
                raise NanoflowError("This AsyncLLM is serving another event loop; make one for each loop.")
            for orphan in self.by_name:
                self.cancel(orphan)
            self._loop, self.by_name, self.names, self.num_tokens = loop, {}, {}, 0
        self.by_name[name], self.names[stream.request_id] = stream, name

    def count(self, stream: Stream, num_tokens: int, limits: EngineConfig) -> None:
        """Count a prompt's tokens, which are about to be queued.

        Raises:
            RequestError: there are too many requests, or too many tokens in their prompts.
        """
        if len(self.by_name) > limits.max_queued_requests:
            raise RequestError(
                f"There are {limits.max_queued_requests} unfinished requests already; try again later, or raise "
                f"engine.max_queued_requests."
            )
        if self.num_tokens + num_tokens > limits.max_queued_tokens:
            raise RequestError(
                f"The prompts of unfinished requests have {self.num_tokens} tokens, and at most "
                f"{limits.max_queued_tokens} may be queued; try again later, or raise engine.max_queued_tokens."
            )
        stream.num_tokens = num_tokens
        self.num_tokens += num_tokens

    def close(self, name: str, stream: Stream) -> None:
        """Forget a stream; runs also while its task is being cancelled, so it waits for nothing."""
        if self.by_name.pop(name, None) is not None:
            self.num_tokens -= stream.num_tokens
        if self.names.get(stream.request_id) == name:
            del self.names[stream.request_id]
        if not stream.ended.is_set():
            stream.ended.set()
            self.cancel(name)

    def error(self) -> NanoflowError:
        """Why there are no more outputs."""
        if self.failure is None:
            return NanoflowError("This AsyncLLM was closed; make a new one.")
        error = NanoflowError(f"The engine stopped at an error ({self.failure!r}); make a new one.")
        error.__cause__ = self.failure
        return error

    # Called in the outputs' thread.

    def post_outputs(self, outputs: list[RequestOutput | Refusal]) -> None:
        """Hand outputs over, and wait until their readers had their turn."""
        seen = threading.Event()
        if self._post(self._take_outputs, outputs, seen):
            seen.wait(LONGEST_TURN)

    def post_end(self, failure: BaseException | None) -> None:
        """Tell all readers that the engine was closed, or what ended it."""
        self.failure = failure
        self._post(self._take_end)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> bool:
        """Have the event loop call it; False if there is none, or it was closed, so that nobody waits any more."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *arguments)
                return True
        return False

    # Called in the event loop.

    def _take_outputs(self, outputs: list[RequestOutput | Refusal], seen: threading.Event) -> None:
        for output in outputs:
            stream = self.by_name.get(output.request_id)
            if stream is None:
                continue
            if isinstance(output, Refusal):
                stream.fail(RequestError(output.message))
            else:
                output.request_id = stream.request_id
                stream.put(output)
                if output.finished:
                    self.names.pop(stream.request_id, None)
        asyncio.get_running_loop().call_soon(seen.set)  # after the readers, who are in the queue already

    def _take_end(self) -> None:
        for stream in self.by_name.values():
            stream.fail(self.error())


class Stream:
    """Outputs of a request on their way to the one who reads them.

    Args:
        request_id: the caller's.
        keeps_all: False lets an output replace one that was not read yet.

    Attributes:
        ended: set when no more outputs will come.
        is_over: whether the last output was read.
        num_tokens: of its prompt, once they are counted.
        is_aborted: whether it is to end with what there is, maybe before the engine knows of it.
    """

    def __init__(self, request_id: str, *, keeps_all: bool) -> None:
        self.request_id = request_id
        self.outputs: deque[RequestOutput] = deque(maxlen=None if keeps_all else 1)
        self.error: BaseException | None = None
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_over = False
        self.is_aborted = False
        self.num_tokens = 0

    def put(self, output: RequestOutput) -> None:
        """Add an output."""
        self.outputs.append(output)
        self.changed.set()
        if output.finished:
            self.ended.set()

    def fail(self, error: BaseException | None) -> None:
        """End it with an error, unless it has ended."""
        if not self.ended.is_set():
            self.error = error
            self.ended.set()
            self.changed.set()

    async def next(self) -> RequestOutput:
        """The next output; waits for it. Raises the error that ended the stream, once what came before was read."""
        await self.changed.wait()
        if not self.outputs:
            self.is_over = True
            assert self.error is not None
            raise self.error
        output = self.outputs.popleft()
        self.is_over = output.finished
        if not self.outputs and self.error is None:
            self.changed.clear()
        return output
