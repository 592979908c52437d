"""`AsyncLLM`: many streams at a time on one event loop, in the manner of vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from nanoflow.core.api.forks import check_can_start, made_in_another
from nanoflow.core.api.inputs import one
from nanoflow.core.api.options import Name, config_from_options
from nanoflow.core.api.signature import shows_options
from nanoflow.core.api.streams import Stream, Streams
from nanoflow.core.api.workers import Workers, is_light, weight_of
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AbortRequest, AddRequest, Stop
from nanoflow.core.data.outputs import EngineStats, RequestOutput
from nanoflow.core.engine.build import build_engine
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.engine_thread import EngineThread
from nanoflow.core.registry.registry import Registry
from nanoflow.core.text.chats import Message, encode_chat
from nanoflow.core.text.prompts import Prompt, encode, needed


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
        check_can_start(config.engine.device)
        engine, self._description = build_engine(config, registry)
        self._pid = os.getpid()
        self._numbers = count()
        self._limits = config.engine
        self._engine: Engine | None = engine
        self._workers = Workers()
        self._streams = Streams(lambda name: thread.submit(AbortRequest(name)))
        thread = self._thread = EngineThread(engine, self._streams.post_outputs, self._streams.post_end)
        # The threads hold the engine, until they are told that nobody holds this any more.
        weakref.finalize(self, thread.submit, Stop()).atexit = False

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
            RequestError: the request can't be served. What takes long is looked at in a thread, and told when the first
                output is asked for.
            NanoflowError: the engine failed or was closed.
        """
        engine = self._usable()
        _check_request_id(request_id)
        params = _params(engine, sampling_params)
        if priority is not None:
            params = replace(params, priority=priority)
        prompt = one(prompt, 0)
        encoded = partial(encode, engine.tokenizer, prompt)
        if not is_light(prompt, params):
            return self._run(partial(_request, engine, encoded, params), params, request_id, prompt)
        found = encoded()
        return self._run(partial(_request, engine, lambda: found, params), params, request_id)

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
        _check_request_id(request_id)
        params = _params(engine, sampling_params)
        encoded = partial(encode_chat, engine.tokenizer, messages, **template)
        return self._run(partial(_request, engine, encoded, params), params, request_id, messages)

    async def abort(self, request_id: str) -> None:
        """End a request with what there is: its last output says `abort`. Nothing happens if there is no such request.

        Returns when its blocks are free and its last output is there to be read.
        """
        _check_request_id(request_id)
        if request_id in self._streams.names:
            name = self._streams.names[request_id]
            stream = self._streams.by_name[name]
            stream.is_aborted = True
            self._streams.cancel(name)
            await stream.ended.wait()

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
        self._workers.close()
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
        self, make_request: Callable[[str], AddRequest], params: SamplingParams, request_id: str | None,
        heavy: Any = None,
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        """Outputs of a request, which is made with its name; in a thread if there is a `heavy` prompt."""
        self._usable()  # this is run when the first output is asked for
        name = str(next(self._numbers))
        stream = Stream(
            name if request_id is None else request_id, keeps_all=params.output_kind is RequestOutputKind.DELTA
        )
        self._streams.open(name, stream)
        try:
            if heavy is None:
                request = make_request(name)
            else:
                try:
                    request = await self._workers.run(partial(weight_of, heavy, params), partial(make_request, name))
                except RuntimeError:  # closed meanwhile
                    self._usable()
                    raise
            del make_request, heavy
            self._usable()
            self._streams.count(stream, len(request.prompt_token_ids), self._limits)
            self._thread.submit(request)
            if stream.is_aborted:
                self._streams.cancel(name)
            while not stream.is_over:
                yield await stream.next()
        finally:
            self._streams.close(name, stream)

    def _usable(self) -> Engine:
        """The engine, of which only what never changes may be used here; an error if it serves no more."""
        if self._streams.failure is not None or self._engine is None:
            raise self._streams.error()
        if os.getpid() != self._pid:
            raise made_in_another(self._pid, "AsyncLLM")
        return self._engine


def _params(engine: Engine, given: SamplingParams | None) -> SamplingParams:
    if given is None:
        return engine.default_params
    if not isinstance(given, SamplingParams):
        raise RequestError(f"sampling_params must be a SamplingParams, got {shown(given):.60}.")
    return given


def _check_request_id(request_id: object) -> None:
    if not isinstance(request_id, str | None):
        raise RequestError(f"request_id must be a text, got {shown(request_id):.60}.")


def _request(
    engine: Engine, encoded: Callable[[], tuple[str | None, list[int]]], params: SamplingParams, name: str
) -> AddRequest:
    """The command that queues a request, checked."""
    text, token_ids = encoded()
    return engine.admission.request(name, token_ids, params, text, params.output_kind)
