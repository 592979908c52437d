"""`SamplingParams`: how the tokens of one request are chosen, and what its output must match."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from nanoflow.core.config.errors import ConfigError, one_line, shown
from nanoflow.core.config.fields import (
    checks_keywords,
    field_names,
    is_int,
    is_number,
    list_of,
    make_plain,
    option,
    require,
)


class RequestOutputKind(str, Enum):
    """What a streamed request's outputs hold. Names follow vLLM; the values are the names, for files and overrides."""

    CUMULATIVE = "CUMULATIVE"  # each output holds all that there is so far
    DELTA = "DELTA"  # each output holds what is new
    FINAL_ONLY = "FINAL_ONLY"  # there is one output, at the end

    __str__ = str.__str__


# Fields that vLLM's classes have or had, and what to do here instead.
ONLY_IN_VLLM = {
    "best_of": "use n, and choose among the completions by their cumulative_logprob",
    "use_beam_search": "use n with a temperature",
    "length_penalty": "it is for beam search",
    "early_stopping": "it is for beam search",
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(json=...)",
    "spaces_between_special_tokens": "the text is the tokenizer's, with spaces as it puts them",
    "stop_reason": "read it from the outputs",
    "extra_args": "use logits_processors={name: arguments}",
    "flat_logprobs": "outputs have a map for each token",
    "logprob_token_ids": "use logprobs=-1 for all of them",
    "structural_tag": "use grammar",
    "whitespace_pattern": "there is one for all",
    "disable_fallback": "there is no other backend to fall back to",
    "disable_any_whitespace": "write the format as a grammar",
    "disable_additional_properties": "write additionalProperties: false in the schema",
}


@checks_keywords(ONLY_IN_VLLM)
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the whole output of a request must match; exactly one field is set. Names follow vLLM.

    Attributes:
        json: a JSON schema: a dict, its text, or an object with `model_json_schema()` such as a pydantic model, which
            is asked for it once.
        choice: two of its texts may begin alike; the longer one stays possible until the shorter one is ended.

    Raises:
        ConfigError: a value of the wrong type, or not exactly one of them.
    """

    json: Any = option(None, "a JSON schema: an object, or its text")
    regex: str | None = option(None, "a regular expression for the whole output, without look-around")
    choice: list[str] | None = option(None, "texts, one of which is the output")
    grammar: str | None = option(None, "a context-free grammar: Lark with the rule start, or GBNF with the rule root")
    json_object: bool = option(False, "any JSON object")

    def __post_init__(self) -> None:
        if hasattr(self.json, "model_json_schema"):
            object.__setattr__(self, "json", _schema_of(self.json))
        make_plain(self)
        require(self.json is None or _is_schema(self.json), "json", self.json,
                "a JSON schema: a dict, the text of a JSON object, or a pydantic model")  # fmt: skip
        for name, kind in {"regex": "a regular expression", "grammar": "a grammar"}.items():
            value = getattr(self, name)
            require(value is None or (isinstance(value, str) and value != ""), name, value, f"{kind}, a non-empty text")
            require(value is None or _is_valid_text(value), name, value, f"{kind} in valid Unicode")
        is_list = list_of(self.choice, lambda s: isinstance(s, str) and s != "")
        require(is_list and (self.choice is None or len(self.choice) > 0), "choice",
                self.choice, "a non-empty list of non-empty texts")  # fmt: skip
        require(list_of(self.choice, _is_valid_text), "choice", self.choice, "texts in valid Unicode")
        require(isinstance(self.json_object, bool), "json_object", self.json_object, "true or false")
        given = [name for name in field_names(type(self)) if self._has(name)]
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs must have exactly one of {', '.join(field_names(type(self)))}, "
                f"got {' and '.join(given) or 'none'}."
            )

    @property
    def kind(self) -> str:
        """The name of the one field that is set."""
        return next(name for name in field_names(type(self)) if self._has(name))

    def _has(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False


def _schema_of(model: Any) -> Any:
    try:
        return model.model_json_schema()
    except Exception as error:  # whatever a class of the user's raises
        raise ConfigError(f"json must be a JSON schema, and the model has none ({one_line(error):.300}).") from error


def _is_schema(value: object) -> bool:
    """Whether this is a JSON object, or its text, in valid Unicode; whether it is a schema turns out later."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        json.dumps(parsed, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(parsed, dict)


def _number_in(key: object) -> object:
    """The token id that a key of a JSON object says; else the key."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key


def _is_valid_text(value: object) -> bool:
    """Whether this is a text that has bytes in UTF-8: one without lone surrogates."""
    return isinstance(value, str) and value != "" and value == value.encode(errors="replace").decode()


@checks_keywords(ONLY_IN_VLLM)
@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names, meanings and defaults follow vLLM's `SamplingParams`.

    Logits pass through, in this order: what is forbidden or favoured (allowed_token_ids, logit_bias, bad_words, stop
    tokens before min_tokens); penalties (repetition, then frequency and presence); its `logits_processors`;
    temperature, top_k, top_p, min_p. `docs/sampling.md` describes each field.

    Raises:
        ConfigError: a value out of its range; the message names the field, the value and the range. Or a keyword that
            is no field; the message says which one was meant.
    """

    n: int = option(1, "completions of each prompt; they share the prompt's KV blocks")
    output_kind: RequestOutputKind = option(
        RequestOutputKind.CUMULATIVE, "what streamed outputs hold: CUMULATIVE | DELTA | FINAL_ONLY"
    )
    temperature: float = option(1.0, "0 is greedy; higher is more random")
    top_p: float = option(1.0, "keep the likeliest tokens that hold this share of probability, in (0, 1]")
    top_k: int = option(0, "keep this many likeliest tokens; 0 or -1 keeps all")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest, in [0, 1]")
    repetition_penalty: float = option(1.0, "> 1 weakens tokens of prompt and output, < 1 favours them; > 0")
    presence_penalty: float = option(0.0, "taken from the logits of tokens of the output, in [-2, 2]")
    frequency_penalty: float = option(0.0, "the same, once for each time the token is there, in [-2, 2]")
    logit_bias: dict[int, float] | None = option(None, "token id -> what its logit gets added, in [-100, 100]")
    allowed_token_ids: list[int] | None = option(None, "generate these token ids only")
    bad_words: list[str] | None = option(None, "texts that are not generated")
    seed: int | None = option(None, "the same seed draws the same tokens in any batch; null: from engine.seed")
    max_tokens: int | None = option(16, "most tokens to generate; null: as many as fit")
    min_tokens: int = option(0, "no stop token or stop string ends the request before this many tokens")
    stop: list[str] | None = option(None, "strings that end the request; not part of its text")
    stop_token_ids: list[int] | None = option(None, "token ids that end the request; not part of its text")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token")
    include_stop_str_in_output: bool = option(False, "keep the stop string or stop token that ended it in the text")
    logprobs: int | None = option(
        None, "log-probabilities of so many likeliest tokens beside each generated one; -1: all"
    )
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")
    prompt_logprobs_start: int = option(0, "index of the first token of the prompt that prompt_logprobs is for")
    detokenize: bool = option(True, "false: token ids only, no text")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    truncate_prompt_tokens: int | None = option(
        None, "use only so many last tokens of the prompt; -1: as many as leave room for max_tokens"
    )
    cache_salt: str | None = option(None, "cached prefixes are shared only among requests with the same salt")
    priority: int = option(0, "who goes first with scheduler=priority: smaller is earlier")
    structured_outputs: StructuredOutputsParams | None = option(
        None, "what the output must match: one of json, regex, choice, grammar, json_object"
    )
    logits_processors: dict[str, Any] | None = option(
        None, "plugins that change the logits of this request: name -> arguments"
    )

    def __post_init__(self) -> None:
        make_plain(self)
        require(is_int(self.n) and self.n >= 1, "n", self.n, "an integer >= 1")
        is_kind = isinstance(self.output_kind, str) and self.output_kind in list(RequestOutputKind)
        require(is_kind, "output_kind", self.output_kind,
                "CUMULATIVE, DELTA or FINAL_ONLY of RequestOutputKind")  # fmt: skip
        object.__setattr__(self, "output_kind", RequestOutputKind(self.output_kind))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        if isinstance(self.logit_bias, dict):  # JSON has no integers for keys
            bias = {_number_in(key): value for key, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        require(is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a number >= 0")
        require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(
            is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer >= 1, or 0 or -1 for all tokens"
        )
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        require(self.seed is None or is_int(self.seed), "seed", self.seed, "an integer or None")
        require(self.max_tokens is None or (is_int(self.max_tokens) and self.max_tokens >= 1), "max_tokens",
                self.max_tokens, "an integer >= 1, or None for as many as fit")  # fmt: skip
        require(is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer >= 0")
        require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
                f"at most max_tokens ({shown(self.max_tokens)})")  # fmt: skip
        require(list_of(self.stop, lambda s: isinstance(s, str) and s != ""), "stop", self.stop,
                "a non-empty string or a list of them")  # fmt: skip
        require(list_of(self.stop_token_ids, lambda i: is_int(i) and i >= 0), "stop_token_ids", self.stop_token_ids,
                "a list of integers >= 0")  # fmt: skip
        self._check_logits()
        self._check_output()

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy, which shares no list with this one, with other values for the fields in `changes`."""
        return replace(deepcopy(self), **changes)

    @property
    def penalties(self) -> tuple[float, float, float] | None:
        """Those for repetition, presence and frequency; None if there is none."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return None if penalties == (1, 0, 0) else penalties

    def _check_logits(self) -> None:
        require(is_number(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty",
                self.repetition_penalty, "a number > 0")  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_number(value) and -2 <= value <= 2, name, value, "a number in [-2, 2]")
        bias = self.logit_bias
        require(bias is None or (isinstance(bias, dict) and all(is_int(key) and key >= 0 for key in bias)
                and all(is_number(value) and -100 <= value <= 100 for value in bias.values())),
                "logit_bias", bias, "a map from token ids >= 0 to numbers in [-100, 100]")  # fmt: skip
        allowed = self.allowed_token_ids
        require(allowed is None or (list_of(allowed, lambda i: is_int(i) and i >= 0) and len(allowed) > 0),
                "allowed_token_ids", allowed, "a list of integers >= 0, at least one")  # fmt: skip
        require(list_of(self.bad_words, lambda s: isinstance(s, str) and s.strip() != ""), "bad_words",
                self.bad_words, "a list of texts that are not blank")  # fmt: skip

    def _check_output(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        require(self.detokenize or not self.stop, "detokenize", self.detokenize, "true where there are stop strings")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or (is_int(value) and value >= -1), name, value,
                    "an integer >= 0, -1 for all tokens, or None for none")  # fmt: skip
        start = self.prompt_logprobs_start
        require(is_int(start) and start >= 0, "prompt_logprobs_start", start, "an integer >= 0")
        length = self.truncate_prompt_tokens
        require(length is None or (is_int(length) and (length >= 1 or length == -1)), "truncate_prompt_tokens", length,
                "an integer >= 1, -1 for what fits, or None")  # fmt: skip
        require(is_int(self.priority), "priority", self.priority, "an integer")
        require(self.cache_salt is None or _is_valid_text(self.cache_salt), "cache_salt", self.cache_salt,
                "a non-empty text in valid Unicode, or None")  # fmt: skip
        require(self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),
                "structured_outputs", self.structured_outputs, "a StructuredOutputsParams or None")  # fmt: skip
        named = self.logits_processors
        require(named is None or (isinstance(named, dict) and all(isinstance(name, str) for name in named)
                and all(isinstance(arguments, dict) for arguments in named.values())), "logits_processors", named,
                "a map from names of plugins to maps of their arguments, or None")  # fmt: skip
