"""nanoflow as a model of EleutherAI's lm-evaluation-harness.

The harness has a registry of models but no entry points, so this module has to be imported before the harness looks for
the model `nanoflow`. `python -m nanoflow.integrations.lm_eval` does that, and is the harness's own command line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from nanoflow import LLM, NanoflowError, SamplingParams
from nanoflow.core.config.errors import ConfigError, RequestError, did_you_mean
from nanoflow.core.config.fields import field_names
from nanoflow.core.text.prompts import needed

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ModuleNotFoundError as error:
    problem = f"The evaluation harness can't be imported ({error}); pip install 'nanoflow-engine[eval]'."
    if __name__ == "__main__":
        sys.exit(problem)
    raise ImportError(problem) from error

logger = logging.getLogger(__name__)
TokenRequest = tuple[Any, list[int], list[int]]  # a key for the harness's cache, context, continuation


@register_model("nanoflow")
class NanoflowLM(TemplateLM):
    """Scores and generates with an `LLM`, as the harness's `hf` model does with transformers.

    Args:
        pretrained: a folder or a Hub id; None is the small checkpoint that comes with the package.
        add_bos_token: whether texts get the tokenizer's special tokens; None leaves it to the tokenizer.
        prefix_token_id: what a text without context is scored after; None is the beginning-of-sequence token, or where
            there is none, the end-of-sequence token.
        max_gen_toks: most tokens to generate where a task doesn't say.
        enable_thinking: a variable of many chat templates; None leaves it unset.
        options: of `LLM`, such as `dtype`, `max_model_len` or `attention`.

    Raises:
        NanoflowError: as `LLM` does, or the checkpoint has no tokenizer.
    """

    def __init__(
        self, pretrained: str | None = None, *, add_bos_token: bool | None = None, prefix_token_id: int | None = None,
        max_gen_toks: int = 256, enable_thinking: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.llm = LLM(pretrained, **options)
        self._tokenizer = needed(self.llm.engine.tokenizer, "the evaluation harness needs")
        self.tokenizer = self._tokenizer.hf  # the harness reads its chat template
        self.add_bos_token = add_bos_token
        self.max_gen_toks = max_gen_toks
        self.chat_template_args = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        known = (prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self._prefix_token_id = next((token_id for token_id in known if token_id is not None), None)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> NanoflowLM:  # fmt: skip
        """One by the harness's `--model_args` and, unless they have one, its `--device`.

        A device cuda:0, which the harness says by default, is the engine's auto. Its batch sizes are ignored, since the
        engine batches by itself.
        """
        device = (additional_config or {}).get("device")
        return cls(**({} if device in (None, "cuda:0") else {"device": device}) | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> NanoflowLM:
        """The same, of `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence id."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        if self._prefix_token_id is None:
            raise ConfigError(
                "The tokenizer has no token for the beginning or the end of a text; give one as prefix_token_id."
            )
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        """Most tokens that something is predicted from: all but the last of a sequence."""
        return self.llm.engine.max_model_len - 1

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's request caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens aren't added to one that begins with the prefix token's text already."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token is not False and not self._has_prefix(string)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _has_prefix(self, string: str) -> bool:
        prefix = "" if self._prefix_token_id is None else self._tokenizer.token_text(self._prefix_token_id)
        return prefix != "" and string.startswith(prefix)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the checkpoint's chat template writes it; see `core.text.chat_template.render`."""
        return self._tokenizer.render_chat(
            chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt,
            chat_template_kwargs=self.chat_template_args,
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation the log-likelihood and whether it is greedy; contexts are cut on the left
        to what fits."""
        longest, contexts, continuations = self.max_length, [], []
        for _, context, continuation in requests:
            if len(continuation) > longest:
                raise RequestError(
                    f"A continuation has {len(continuation)} tokens, but after a context no more than {longest} fit "
                    f"into max_model_len; raise it."
                )
            contexts.append(context[-(longest + 1 - len(continuation)) :])
            continuations.append(continuation)
        _warn_of_cuts([len(request[1]) for request in requests], contexts)
        scores = self.llm.score(contexts, continuations, use_tqdm=not disable_tqdm)
        answers = [(score.total, score.is_greedy) for score in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of all the context that fits, where it is longer than that."""
        windows: list[TokenRequest] = []
        ends = []
        for request in requests:
            token_ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        totals = [total for total, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        answers = [sum(totals[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each text up to the first of its stop strings, which is left out; contexts are cut on the
        left to what leaves room for the output."""
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        params = [self._params(request.args[1]) for request in requests]
        rooms = [self._room(param.max_tokens) for param in params]
        contexts = [context[-room:] for context, room in zip(encoded, rooms, strict=True)]
        _warn_of_cuts(list(map(len, encoded)), contexts)
        outputs = self.llm.generate(contexts, params, use_tqdm=not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, gen_kwargs: dict[str, Any]) -> SamplingParams:
        """Sampling parameters by a task's `generation_kwargs`."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        kwargs.pop("do_sample")  # the temperature says it
        stop = [text for text in kwargs.pop("until") if text]
        options = {"temperature": 0.0, "max_tokens": kwargs.pop("max_gen_toks"), "stop": stop} | kwargs
        known = field_names(SamplingParams)
        for name in options:
            if name not in known:
                raise ConfigError(f"{name!r} in generation_kwargs is no sampling parameter.{did_you_mean(name, known)}")
        return SamplingParams(**options)

    def _room(self, max_tokens: int) -> int:
        """Tokens of context that fit beside the output."""
        room = self.llm.engine.max_model_len - max_tokens
        if room < 1:
            raise RequestError(
                f"There is no room for a context beside an output of {max_tokens} tokens (max_gen_toks), since "
                f"max_model_len is {self.llm.engine.max_model_len}; lower the one or raise the other."
            )
        return room


def _warn_of_cuts(lengths: list[int], contexts: list[list[int]]) -> None:
    count = sum(len(context) < length for context, length in zip(contexts, lengths, strict=True))
    if count:
        logger.warning("%d of %d contexts were cut on the left to fit into max_model_len.", count, len(contexts))


def main() -> None:
    """The harness's command line, which knows the model `nanoflow`."""
    try:
        cli_evaluate()
    except NanoflowError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
