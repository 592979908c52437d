"""`AsyncLLM`: many streams at a time on one event loop, in the manner of vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

from nanoflow.core.api.inputs import one
from nanoflow.core.api.options import Name, config_from_options
from nanoflow.core.api.signature import shows_options
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import NanoflowError, RequestError, shown
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AbortRequest, Refusal
from nanoflow.core.data.outputs import EngineStats, RequestOutput
from nanoflow.core.engine.build import build_engine
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.engine_thread import EngineThread
from nanoflow.core.registry.registry import Registry
from nanoflow.core.text.chats import Message, encode_chat
from nanoflow.core.text.prompts import Prompt, encode, needed

LONGEST_TURN = 0.1  # seconds to wait for an event loop that is busy, or has stopped


class AsyncLLM:
    """An engine with a checkpoint that serves many callers of one event loop at a time; it steps in its own thread.

    Args:
        checkpoint: a folder or a Hub id; None is the small checkpoint that comes with the package.
        options: as in `LLM`.

    Raises:
        NanoflowError: as `LLM` does.

    Example:
        >>> async with AsyncLLM() as engine:
        ...     async for output in engine.generate("HAMLET:", SamplingParams(max_tokens=32), "my-request"):
        ...         print(output["text"])
    """

    @shows_options
    def __init__(self, checkpoint: Name | None = None, **options: Any) -> None:
        registry = Registry.load()
        for problem in registry.problems:
            warnings.warn(problem, stacklevel=2)
        self._start(config_from_options(registry, checkpoint, options, "AsyncLLM"), registry)

    @classmethod
    def from_config(cls, config: Config, registry: Registry | None = None) -> AsyncLLM:
        """An engine by a whole config; see the class for what it raises."""
        llm = cls.__new__(cls)
        llm._start(config, registry or Registry.load())
        return llm

    def _start(self, config: Config, registry: Registry) -> None:
        engine, self._description = build_engine(config, registry)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}  # by the names that the engine knows them by; the event loop's own
        self._names: dict[str, str] = {}  # of unfinished streams, by the callers' ids
        self._numbers = count()
        self._engine: Engine | None = engine
        self._failure: BaseException | None = None
        self._thread = EngineThread(engine, self._post_outputs, self._post_end)

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None,
        priority: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        """Complete a prompt, and yield outputs as they come; the last one is `finished`.

        A reader that is slower than the engine gets the newest cumulative output next, and deltas one by one.
        Cancelling the reading task or closing the generator aborts the request; `abort` ends it with what there is.

        Args:
            prompt: a text, token ids (a list or an array of one dimension), `{"prompt": text}` or
                `{"prompt_token_ids": ids}`.
            sampling_params: how to sample, and by `output_kind` what outputs hold; None for the defaults.
            request_id: a text that differs from those of unfinished requests; None makes one up.
            priority: takes the place of `SamplingParams.priority`.

        Raises:
            RequestError: the request can't be served.
            NanoflowError: the engine failed or was closed.
        """
        engine = self._usable()
        _check(sampling_params, request_id)
        if priority is not None:
            sampling_params = replace(sampling_params or engine.default_params, priority=priority)
        return self._run(engine, *encode(engine.tokenizer, one(prompt, 0)), sampling_params, request_id)

    def chat(
        self, messages: list[Message], sampling_params: SamplingParams | None = None, request_id: str | None = None,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        """Answer a conversation through the checkpoint's chat template, as `generate` completes a prompt.

        Args:
            messages: `{"role": ..., "content": ...}` in the order in which they were said.
            sampling_params, request_id: as in `generate`.
            template: as in `LLM.chat`.
        """
        engine = self._usable()
        _check(sampling_params, request_id)
        encoded = encode_chat(engine.tokenizer, messages, **template)
        return self._run(engine, *encoded, sampling_params, request_id)

    async def abort(self, request_id: str) -> None:
        """End a request with what there is: its last output says `abort`. Nothing happens if there is no such request.

        Returns when its blocks are free and its last output is there to be read.
        """
        _check(None, request_id)
        if request_id in self._names:
            name = self._names[request_id]
            self._cancel(name)
            await self._streams[name].ended.wait()

    async def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer.

        Raises:
            RequestError: the checkpoint has none.
        """
        return needed(self._usable().tokenizer, "get_tokenizer() needs").hf

    def describe(self) -> dict[str, str]:
        """What the engine is made of: checkpoint, the plugin of each role, device and dtype."""
        return dict(self._description)

    async def close(self) -> None:
        """End all requests as `abort` does, and let go of the model and the KV cache. May be called twice."""
        self._engine = None
        await asyncio.to_thread(self._thread.stop)
        await asyncio.sleep(0)  # what the threads posted last

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was built."""
        return replace(self._usable().stats)

    async def _run(
        self, engine: Engine, text: str | None, token_ids: list[int], params: SamplingParams | None,
        request_id: str | None,
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        self._usable()  # this is run when the first output is asked for
        params = params or engine.default_params
        name = str(next(self._numbers))
        request = engine.admission.request(name, token_ids, params, text, params.output_kind)
        del engine
        stream = Stream(
            name if request_id is None else request_id, keeps_all=params.output_kind is RequestOutputKind.DELTA
        )
        self._open(name, stream)
        try:
            self._thread.submit(request)
            while not stream.is_over:
                yield await stream.next()
        finally:
            self._close(name, stream)

    def _open(self, name: str, stream: Stream) -> None:
        if stream.request_id in self._names:
            raise RequestError(f"There is an unfinished request {stream.request_id!r} already; ids must differ.")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._streams and self._loop is not None and not self._loop.is_closed():
                raise NanoflowError("This AsyncLLM is serving another event loop; make one for each loop.")
            for orphan in self._streams:
                self._cancel(orphan)
            self._loop, self._streams, self._names = loop, {}, {}
        self._streams[name], self._names[stream.request_id] = stream, name

    def _close(self, name: str, stream: Stream) -> None:
        """Forget a stream; runs also while its task is being cancelled, so it waits for nothing."""
        self._streams.pop(name, None)
        if self._names.get(stream.request_id) == name:
            del self._names[stream.request_id]
        if not stream.ended.is_set():
            stream.ended.set()
            self._cancel(name)

    def _cancel(self, name: str) -> None:
        self._thread.submit(AbortRequest(name))

    def _usable(self) -> Engine:
        """The engine, of which only what never changes may be used here; an error if it serves no more."""
        if self._failure is not None or self._engine is None:
            raise self._error()
        return self._engine

    def _error(self) -> NanoflowError:
        """Why there are no more outputs."""
        if self._failure is None:
            return NanoflowError("This AsyncLLM was closed; make a new one.")
        error = NanoflowError(f"The engine stopped at an error ({self._failure!r}); make a new one.")
        error.__cause__ = self._failure
        return error

    # Called in the outputs' thread.

    def _post_outputs(self, outputs: list[RequestOutput | Refusal]) -> None:
        """Hand outputs over, and wait until their readers had their turn."""
        seen = threading.Event()
        self._post(self._take_outputs, outputs, seen)
        seen.wait(LONGEST_TURN)

    def _post_end(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._post(self._take_end)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(callback, *arguments)

    # Called in the event loop.

    def _take_outputs(self, outputs: list[RequestOutput | Refusal], seen: threading.Event) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if isinstance(output, Refusal):
                stream.fail(RequestError(output.message))
            else:
                output.request_id = stream.request_id
                stream.put(output)
                if output.finished:
                    self._names.pop(stream.request_id, None)
        asyncio.get_running_loop().call_soon(seen.set)  # after the readers, who are in the queue already

    def _take_end(self) -> None:
        for stream in self._streams.values():
            stream.fail(self._error())


def _check(sampling_params: object, request_id: object) -> None:
    if not isinstance(sampling_params, SamplingParams | None):
        raise RequestError(f"sampling_params must be a SamplingParams, got {shown(sampling_params):.60}.")
    if not isinstance(request_id, str | None):
        raise RequestError(f"request_id must be a text, got {shown(request_id):.60}.")


class Stream:
    """Outputs of a request on their way to the one who reads them.

    Args:
        request_id: the caller's.
        keeps_all: False lets an output replace one that was not read yet.

    Attributes:
        ended: set when no more outputs will come.
        is_over: whether the last output was read.
    """

    def __init__(self, request_id: str, *, keeps_all: bool) -> None:
        self.request_id = request_id
        self.outputs: deque[RequestOutput] = deque(maxlen=None if keeps_all else 1)
        self.error: BaseException | None = None
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_over = False

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
