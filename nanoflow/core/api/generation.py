"""`generate`: prompts in, outputs out; the calls of one caller on an engine that steps only while they wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from nanoflow.core.api.arguments import naming_prompt, params_for, with_priorities
from nanoflow.core.api.forks import made_in_another
from nanoflow.core.api.inputs import listed
from nanoflow.core.api.interrupts import deferred_interrupts
from nanoflow.core.api.progress import Progress
from nanoflow.core.api.turns import Turns
from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AddRequest
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.engine.engine import Engine
from nanoflow.core.text.prompts import Prompt, encode

EncodedPrompt: TypeAlias = "tuple[str | None, list[int]]"
Inbox: TypeAlias = deque[tuple[int, RequestOutput]]  # outputs, each with its prompt's place in the call


class Generation:
    """Runs requests on an engine; what `LLM` is made of, which adds the ways to build one and to call it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inboxes: dict[str, tuple[Inbox, int]] = {}  # by request id, of calls that are going on
        self._turns = Turns(partial(_abort, engine))
        self._pid = os.getpid()
        self._closed = False

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | list[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched as the scheduler sees fit.

        Args:
            prompts: a text, token ids (a list or an array of one dimension), `{"prompt": text}` or
                `{"prompt_token_ids": ids}`, a list of these, or what a tokenizer of transformers returns.
            sampling_params: one for all, or a list with one for each prompt; None for `get_default_sampling_params`.
            use_tqdm: show a progress bar.
            priority: takes the place of `SamplingParams.priority`; one for all, or a list with one for each prompt.

        Returns:
            An output for each prompt, in the order of the prompts.

        Raises:
            RequestError: a prompt that can't be served. All are checked first, so nothing was generated then.
        """
        encoded = self._encoded(prompts)
        if priority is not None:
            given = self.engine.default_params if sampling_params is None else sampling_params
            sampling_params = with_priorities(params_for(given, len(encoded)), priority)
        return self._run(encoded, sampling_params, use_tqdm)

    @property
    def engine(self) -> Engine:
        """The engine below, for those who want to step it themselves.

        Raises:
            NanoflowError: the LLM was closed, or made in another process.
        """
        if self._closed:
            raise NanoflowError("This LLM was closed; make a new one.")
        if os.getpid() != self._pid:
            raise made_in_another(self._pid, "LLM")
        return self._engine

    def _encoded(self, prompts: Any) -> list[EncodedPrompt]:
        items = [prompts] if type(prompts) is str else prompts
        if type(items) is not list or not set(map(type, items)) <= {str}:
            items = listed(prompts, "prompts")
        return [encode(self.engine.tokenizer, prompt, index) for index, prompt in enumerate(items)]

    def _checked(
        self, prompts: list[EncodedPrompt], sampling_params: SamplingParams | list[SamplingParams] | None,
        *, streams: bool = False,
    ) -> list[AddRequest]:  # fmt: skip
        """A request for each prompt, once all prompts are known to be servable; they have no ids yet."""
        engine = self.engine
        params = params_for(engine.default_params if sampling_params is None else sampling_params, len(prompts))
        requests = []
        for index, ((text, token_ids), param) in enumerate(zip(prompts, params, strict=True)):
            kind = param.output_kind if streams else RequestOutputKind.FINAL_ONLY
            with naming_prompt(index, len(prompts)):
                requests.append(engine.admission.request("", token_ids, param, text, kind))
        return requests

    def _run(
        self,
        prompts: list[EncodedPrompt],
        sampling_params: SamplingParams | list[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = self._checked(prompts, sampling_params)
        outputs: dict[int, RequestOutput] = {}
        progress = Progress(self.engine.stats, len(requests)) if use_tqdm else nullcontext()
        interrupts = deferred_interrupts(self.engine.executor.patience)
        with self._submitted(requests) as inbox, progress as shown, interrupts as check_interrupts:
            while len(outputs) < len(requests):
                self._step(inbox)
                check_interrupts()
                while inbox:  # which another thread may be filling
                    index, output = inbox.popleft()
                    outputs[index] = output
                if shown is not None:
                    shown.show(len(outputs))
        return [outputs[index] for index in range(len(requests))]

    @contextmanager
    def _submitted(self, requests: list[AddRequest]) -> Iterator[Inbox]:
        """Queue requests; gives where `_step` puts their outputs. In the end, what is unfinished is aborted."""
        engine, turns, inbox = self.engine, self._turns, Inbox()
        try:
            with deferred_interrupts(), turns.take():
                first = engine.num_requests
                for index, request in enumerate(requests):
                    request.request_id = str(first + index)
                    engine.submit(request)
                    self._inboxes[request.request_id] = inbox, index
            yield inbox
        finally:
            for request in requests:
                self._inboxes.pop(request.request_id, None)
            turns.leave([request.request_id for request in requests])

    def _step(self, wanted: Inbox) -> None:
        """One step of the engine, for all calls that are going on; each has its outputs put into its own inbox.

        There is none if, at this thread's turn, others have put something into `wanted`.
        """
        with self._turns.take():
            if wanted:
                return
            for output in self.engine.step():
                inbox, index = self._inboxes.get(output.request_id, (None, 0))
                if inbox is not None:
                    inbox.append((index, output))


def _abort(engine: Engine, request_id: str) -> None:
    """Abort a request; where the engine has failed, what else goes wrong is no news."""
    try:
        if request_id in engine.requests:
            engine.abort(request_id)
    except Exception:
        if engine.failure is None:
            raise
