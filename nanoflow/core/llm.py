"""`LLM`: the offline API, in the manner of vLLM's and nano-vLLM's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from tqdm import tqdm

from nanoflow.core.build import build_engine
from nanoflow.core.config import ROLES, Config, EngineConfig, PluginChoice, SamplingParams, field_names
from nanoflow.core.engine import Engine
from nanoflow.core.errors import ConfigError, NanoflowError, RequestError, did_you_mean
from nanoflow.core.registry import AUTO, Registry
from nanoflow.core.types import EngineStats, RequestOutput

Prompt: TypeAlias = "str | list[int] | dict[str, Any]"
Message: TypeAlias = "dict[str, str]"


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
        self._closed = False

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, batched as the scheduler sees fit.

        Args:
            prompts: a text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`, or a list of these.
            sampling_params: one for all, or a list with one for each prompt; None for `get_default_sampling_params`.
            use_tqdm: show a progress bar.

        Returns:
            An output for each prompt, in the order of the prompts.

        Raises:
            RequestError: a prompt that can't be served. All are checked first, so nothing was generated then.
        """
        prompts = [prompts] if _is_single(prompts) else prompts
        if not isinstance(prompts, list | tuple):
            raise RequestError(f"prompts must be a text, token ids, or a list of these, got {type(prompts).__name__}.")
        return self._run([self.encode(prompt, i) for i, prompt in enumerate(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, through the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` in the order in which they were said.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: as in `generate`, or the checkpoint has no chat template.
        """
        tokenizer = self._tokenizer("chat() needs")
        if not isinstance(messages, list | tuple) or not messages:
            raise RequestError("messages must be a list of {'role': ..., 'content': ...}.")
        conversations = [messages] if isinstance(messages[0], dict) else messages
        rendered = [tokenizer.render_chat(conversation) for conversation in conversations]
        return self._run([(text, tokenizer.encode_chat(text)) for text in rendered], sampling_params, use_tqdm)

    def encode(self, prompt: Prompt, index: int = 0) -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and its token ids.

        Raises:
            RequestError: it is neither; the message calls it prompt `index`.
        """
        text, token_ids = prompt, prompt
        if isinstance(prompt, dict):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if isinstance(text, str):
            return text, self._tokenizer("a prompt in words needs").encode(text)
        if not isinstance(token_ids, list | tuple) or not all(
            isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in token_ids
        ):
            raise RequestError(f"Prompt {index} must be a text or a list of token ids, got {prompt!r:.60}.")
        return None, list(token_ids)

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
            del self._engine

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | list[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        engine = self.engine
        params = _params_for(engine.default_params if sampling_params is None else sampling_params, len(prompts))
        for index, ((_, token_ids), param) in enumerate(zip(prompts, params, strict=True)):
            with _naming_prompt(index, len(prompts)):
                engine.check_request(token_ids, param)
        first = engine.num_requests
        places = {str(first + index): index for index in range(len(prompts))}
        outputs: dict[int, RequestOutput] = {}
        try:
            for (text, token_ids), param, request_id in zip(prompts, params, places, strict=True):
                engine.add_request(request_id, token_ids, param, text)
            with Progress(engine.stats, len(prompts), enabled=use_tqdm) as progress:
                while engine.has_unfinished:
                    for output in engine.step():
                        outputs[places[output.request_id]] = output
                    progress.show(len(outputs))
        finally:
            for request_id in places:
                engine.abort(request_id)
        return [outputs[index] for index in range(len(prompts))]

    def _tokenizer(self, wish: str) -> Any:
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestError(f"The checkpoint has no tokenizer, which {wish}; give the prompt as token ids.")
        return tokenizer


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


def config_from_options(registry: Registry, checkpoint: str | None, options: dict[str, Any]) -> Config:
    """Sort flat keywords into the engine's options and those of the chosen plugins.

    Raises:
        ConfigError: a keyword that neither the engine nor any chosen plugin knows.
        PluginError: an unknown plugin name.
    """
    options = dict(options)
    defaults = Config()
    choices = {role: PluginChoice(options.pop(role, getattr(defaults, role).name)) for role in ROLES}
    homes: dict[str, dict[str, Any]] = {name: {} for name in ("engine", *ROLES)}
    known = dict.fromkeys(field_names(EngineConfig), "engine")
    for role, choice in choices.items():
        if choice.name != AUTO:
            for name in field_names(registry.get(role, choice.name).component.config):
                known.setdefault(name, role)
    for name, value in options.items():
        if name not in known:
            everything = sorted([*known, *ROLES, "checkpoint"])
            raise ConfigError(
                f"LLM() has no option {name!r}; it has: {', '.join(everything)}.{did_you_mean(name, everything)}"
            )
        homes[known[name]][name] = value
    return Config(
        checkpoint=defaults.checkpoint if checkpoint is None else str(checkpoint),
        engine=EngineConfig(**homes["engine"]),
        **{role: replace(choice, options=homes[role]) for role, choice in choices.items()},
    )


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


@contextmanager
def _naming_prompt(index: int, count: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"Prompt {index}: {error}" if count > 1 else str(error)) from None
