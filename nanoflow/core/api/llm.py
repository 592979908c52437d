"""`LLM`: the offline API, in the manner of vLLM's and nano-vLLM's."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nanoflow.core.api.arguments import naming_prompt
from nanoflow.core.api.forks import check_can_start
from nanoflow.core.api.generation import Generation
from nanoflow.core.api.inputs import listed, one
from nanoflow.core.api.interrupts import deferred_interrupts
from nanoflow.core.api.options import Name, config_from_options
from nanoflow.core.api.scoring import Pair, pairs
from nanoflow.core.api.signature import shows_options
from nanoflow.core.api.turns import Turns
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.messages import AddRequest
from nanoflow.core.data.outputs import EngineStats, RequestOutput, Score
from nanoflow.core.engine.build import build_engine
from nanoflow.core.engine.engine import Engine
from nanoflow.core.registry.registry import Registry
from nanoflow.core.text.chats import Message, encode_chats
from nanoflow.core.text.prompts import Prompt, encode, needed


class LLM(Generation):
    """An engine with a checkpoint, for offline use.

    Several threads may call it at a time; their prompts are batched together. Ctrl-C aborts the call that it meets, at
    the end of a step, and leaves the engine as it was.

    Args:
        checkpoint: a folder or a Hub id; None is the small checkpoint that comes with the package.
        options: flat names as in vLLM: the fields of `EngineConfig` (`dtype=`, `seed=`, `max_model_len=`, ...); a
            plugin's name for each role (`model=`, `attention=`, `scheduler=`, `block_manager=`); and the options of
            the chosen plugins (`max_num_seqs=`, ...). `model=` may name the checkpoint instead, as in vLLM, whose other
            names are taken where they mean something here (`docs/from-vllm.md`).

    Raises:
        ConfigError: an unknown keyword or a value out of its range.
        CheckpointError: the checkpoint is missing, corrupt or of an unknown architecture.
        PluginError: a plugin that is unknown or can't serve here.

    Example:
        >>> with LLM(max_num_seqs=64) as llm:
        ...     print(llm.generate("HAMLET:", SamplingParams(max_tokens=32))[0]["text"])
    """

    @shows_options
    def __init__(self, checkpoint: Name | None = None, **options: Any) -> None:
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
        check_can_start(config.engine.device)
        engine, self._description = build_engine(config, registry)
        super().__init__(engine)
        # At the latest before the interpreter ends, whose objects no other thread may touch then.
        self._end = weakref.finalize(self, _close, engine, os.getpid())

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
                `chat_template_kwargs`, as `core.text.chat_template.render` describes them.

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
        found = pairs(self.engine.tokenizer, listed(prompts, "prompts"), listed(continuations, "continuations"))
        for index, pair in enumerate(found):
            with naming_prompt(index, len(found)):
                pair.check(self.engine.max_model_len)
        outputs = self._run([(None, pair.prompt) for pair in found], [pair.params for pair in found], use_tqdm)
        return list(map(Pair.score, found, outputs))

    def encode(self, prompt: Prompt, index: int = 0) -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and its token ids.

        Raises:
            RequestError: it is neither; the message calls it prompt `index`.
        """
        return encode(self.engine.tokenizer, one(prompt, index), index)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer.

        Raises:
            RequestError: the checkpoint has none.
        """
        return needed(self.engine.tokenizer, "get_tokenizer() needs").hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no `sampling_params` are given: by the checkpoint's generation_config.json, unless the
        engine's option `generation_config` is `none`."""
        return self.engine.default_params

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
            with deferred_interrupts(), self._turns.take():
                self._end()
            del self._engine
            self._turns = Turns(lambda request_id: None)  # lets go of the engine, too

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(self, requests: list[AddRequest]) -> Iterator[RequestOutput]:
        num_finished = 0
        with self._submitted(requests) as inbox:
            while num_finished < len(requests):
                with deferred_interrupts(self.engine.executor.patience):
                    self._step(inbox)
                while inbox:
                    index, output = inbox.popleft()
                    num_finished += output.finished
                    output.request_id = str(index)
                    yield output


def _close(engine: Engine, pid: int) -> None:
    """Close an engine, unless this is a fork of its process."""
    if os.getpid() == pid:
        engine.close()
