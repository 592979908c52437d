"""`LLM`: the offline API, in the manner of vLLM's and nano-vLLM's."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from tqdm import tqdm

from nanoflow.core.api.options import config_from_options
from nanoflow.core.api.scoring import Pair, pairs
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import NanoflowError, RequestError
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AddRequest
from nanoflow.core.data.outputs import EngineStats, RequestOutput, Score
from nanoflow.core.engine.build import build_engine
from nanoflow.core.engine.engine import Engine
from nanoflow.core.registry.registry import Registry
from nanoflow.core.text.prompts import Message, Prompt, encode, encode_chats

EncodedPrompt: TypeAlias = "tuple[str | None, list[int]]"
Inbox: TypeAlias = deque[tuple[int, RequestOutput]]  # outputs, each with its prompt's place in the call


class LLM:
    """An engine with a checkpoint, for offline use.

    Args:
        checkpoint: a folder or a Hub id; None is the small checkpoint that comes with the package.
        options: flat names as in vLLM: the fields of `EngineConfig` (`dtype=`, `seed=`, `max_model_len=`, ...); a
            plugin's name for each role (`model=`, `attention=`, `scheduler=`, `block_manager=`); and the options of
            the chosen plugins (`max_num_seqs=`, ...).

    Raises:
        ConfigError: an unknown keyword or a value out of its range.
        CheckpointError: the checkpoint is missing, corrupt or of an unknown architecture.
        PluginError: a plugin that is unknown or can't serve here.

    Example:
        >>> with LLM(max_num_seqs=64) as llm:
        ...     print(llm.generate("HAMLET:", SamplingParams(max_tokens=32))[0]["text"])
    """

    def __init__(self, checkpoint: str | None = None, **options: Any) -> None:
        registry = Registry.load()
        for problem in registry.problems:
            warnings.warn(problem, stacklevel=2)
        self._start(config_from_options(registry, checkpoint, options), registry)

    @classmethod
    def from_config(cls, config: Config, registry: Registry | None = None) -> LLM:
        """An engine by a whole config, as the command line has it; see the class for what it raises."""
        llm = cls.__new__(cls)
        llm._start(config, registry or Registry.load())
        return llm

    def _start(self, config: Config, registry: Registry) -> None:
        self._engine, self._description = build_engine(config, registry)
        # At the latest before the interpreter ends, whose objects no other thread may touch then.
        self._end = weakref.finalize(self, self._engine.close)
        self._inboxes: dict[str, tuple[Inbox, int]] = {}  # by request id, of calls that are going on
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
            prompts: a text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`, or a list of these.
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
            params = _params_for(sampling_params or self.engine.default_params, len(encoded))
            sampling_params = _with_priorities(params, priority)
        return self._run(encoded, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete prompts, and yield outputs as they come: for each prompt several, the last of which is `finished`.

        `SamplingParams.output_kind` says what they hold, by default all there is so far; `request_id` is the prompt's
        place in the list. Text that may yet become a stop string comes once it has not. Several streams may be read in
        turns. Closing the iterator, or letting go of it, aborts what is unfinished.

        Args:
            prompts: as in `generate`.
            sampling_params: as in `generate`.

        Raises:
            RequestError: as in `generate`, at once.
        """
        return self._stream(self._checked(self._encoded(prompts), sampling_params, streams=True))

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, through the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` in the order in which they were said.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.
            template: `tools`, `chat_template`, `add_generation_prompt`, `continue_final_message` and
                `chat_template_kwargs`, as `Tokenizer.render_chat` describes them.

        Raises:
            RequestError: as in `generate`, or the checkpoint has no chat template, or it refuses the messages.
        """
        return self._run(encode_chats(self.engine.tokenizer, messages, **template), sampling_params, use_tqdm)

    def score(
        self,
        prompts: Prompt | list[Prompt],
        continuations: Prompt | list[Prompt],
        use_tqdm: bool = True,
    ) -> list[Score]:
        """How likely given continuations of prompts are, batched like `generate`; nothing is sampled.

        Tokens of a prompt that the prefix cache holds are not computed again, so that several continuations of one
        prompt cost little more than one.

        Args:
            prompts: as in `generate`, each of at least one token.
            continuations: texts or token ids, one for each prompt. The tokens of a text after a text are those that
                the two together have after the prompt's; its own, where a token of the two together spans the join.
            use_tqdm: show a progress bar.

        Returns:
            A score for each pair, in their order.

        Raises:
            RequestError: a pair that can't be served, such as one with more tokens than `max_model_len`. All are
                checked first.
        """
        found = pairs(self.engine.tokenizer, _listed(prompts, "prompts"), _listed(continuations, "continuations"))
        for index, pair in enumerate(found):
            with _naming_prompt(index, len(found)):
                pair.check(self.engine.max_model_len)
        outputs = self._run([(None, pair.prompt) for pair in found], [pair.params for pair in found], use_tqdm)
        return list(map(Pair.score, found, outputs))

    def encode(self, prompt: Prompt, index: int = 0) -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and its token ids.

        Raises:
            RequestError: it is neither; the message calls it prompt `index`.
        """
        return encode(self.engine.tokenizer, prompt, index)

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no `sampling_params` are given: by the checkpoint's generation_config.json, unless the
        engine's option `generation_config` is `none`."""
        return self.engine.default_params

    @property
    def engine(self) -> Engine:
        """The engine below, for those who want to step it themselves.

        Raises:
            NanoflowError: the LLM was closed.
        """
        if self._closed:
            raise NanoflowError("This LLM was closed; make a new one.")
        return self._engine

    def describe(self) -> dict[str, str]:
        """What the engine is made of: checkpoint, the plugin of each role, device and dtype."""
        return dict(self._description)

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was built."""
        return replace(self.engine.stats)

    def close(self) -> None:
        """Let go of the model and the KV cache; the object can't generate any more. May be called twice."""
        if not self._closed:
            self._closed = True
            self._end()
            del self._engine

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encoded(self, prompts: Any) -> list[EncodedPrompt]:
        return [self.encode(prompt, index) for index, prompt in enumerate(_listed(prompts, "prompts"))]

    def _checked(
        self, prompts: list[EncodedPrompt], sampling_params: SamplingParams | list[SamplingParams] | None,
        *, streams: bool = False,
    ) -> list[AddRequest]:  # fmt: skip
        """A request for each prompt, once all prompts are known to be servable; they have no ids yet."""
        engine = self.engine
        params = _params_for(engine.default_params if sampling_params is None else sampling_params, len(prompts))
        requests = []
        for index, ((text, token_ids), param) in enumerate(zip(prompts, params, strict=True)):
            kind = param.output_kind if streams else RequestOutputKind.FINAL_ONLY
            with _naming_prompt(index, len(prompts)):
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
        progress = Progress(self.engine.stats, len(requests), enabled=use_tqdm)
        with self._submitted(requests) as inbox, progress:
            while len(outputs) < len(requests):
                self._step()
                outputs.update(inbox)
                inbox.clear()
                progress.show(len(outputs))
        return [outputs[index] for index in range(len(requests))]

    def _stream(self, requests: list[AddRequest]) -> Iterator[RequestOutput]:
        num_finished = 0
        with self._submitted(requests) as inbox:
            while num_finished < len(requests):
                if not inbox:
                    self._step()
                while inbox:
                    index, output = inbox.popleft()
                    num_finished += output.finished
                    output.request_id = str(index)
                    yield output

    @contextmanager
    def _submitted(self, requests: list[AddRequest]) -> Iterator[Inbox]:
        """Queue requests; gives where `_step` puts their outputs. In the end, what is unfinished is aborted."""
        engine = self.engine
        first, inbox = engine.num_requests, Inbox()
        for index, request in enumerate(requests):
            request.request_id = str(first + index)
        try:
            for index, request in enumerate(requests):
                engine.submit(request)
                self._inboxes[request.request_id] = inbox, index
            yield inbox
        finally:
            for request in requests:
                engine.abort(request.request_id)
                self._inboxes.pop(request.request_id, None)

    def _step(self) -> None:
        """One step of the engine, for all calls that are going on; each has its outputs put into its own inbox."""
        for output in self.engine.step():
            inbox, index = self._inboxes.get(output.request_id, (None, 0))
            if inbox is not None:
                inbox.append((index, output))


class Progress:
    """A progress bar: prompts done, and tokens a second of prefill and decode.

    Args:
        stats: the engine's, read as it grows.
        total: prompts.
        enabled: False shows nothing.
    """

    def __init__(self, stats: EngineStats, total: int, *, enabled: bool) -> None:
        self.stats = stats
        self.bar = tqdm(total=total, desc="Processed prompts", unit="prompt", disable=not enabled, dynamic_ncols=True)
        self.start = time.perf_counter()
        self.before = replace(stats)

    def show(self, num_done: int) -> None:
        """Bring the bar up to date; cheap enough for every step."""
        if self.bar.disable:
            return
        elapsed = time.perf_counter() - self.start
        prefill = (self.stats.num_prefill_tokens - self.before.num_prefill_tokens) / elapsed
        decode = (self.stats.num_decode_tokens - self.before.num_decode_tokens) / elapsed
        self.bar.set_postfix_str(f"prefill {prefill:,.0f} tok/s, decode {decode:,.0f} tok/s", refresh=False)
        self.bar.update(num_done - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def _listed(prompts: Any, name: str) -> list[Any] | tuple[Any, ...]:
    """One prompt, or several, as several."""
    prompts = [prompts] if _is_single(prompts) else prompts
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"{name} must be a text, token ids, or a list of these, got {type(prompts).__name__}.")
    return prompts


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, list | tuple):
        return len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
    return isinstance(prompts, str | dict)


def _params_for(params: SamplingParams | list[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple) or not all(isinstance(item, SamplingParams) for item in params):
        raise RequestError(f"sampling_params must be a SamplingParams or a list of them, got {params!r:.60}.")
    if len(params) != count:
        raise RequestError(
            f"There are {count} prompts but {len(params)} sampling_params; give one, or one for each prompt."
        )
    return list(params)


def _with_priorities(params: list[SamplingParams], priority: int | list[int]) -> list[SamplingParams]:
    priorities = priority if isinstance(priority, list | tuple) else [priority] * len(params)
    if len(priorities) != len(params):
        raise RequestError(f"There are {len(params)} prompts but {len(priorities)} priorities; give one for each.")
    return [replace(item, priority=number) for item, number in zip(params, priorities, strict=True)]


@contextmanager
def _naming_prompt(index: int, count: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"Prompt {index}: {error}" if count > 1 else str(error)) from None
