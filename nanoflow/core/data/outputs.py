"""What callers get: completions, log-probabilities, scores, metrics and the engine's counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """How likely a token was. Names follow vLLM.

    Attributes:
        logprob: natural logarithm of its probability by the model alone, before penalties, temperature and filters.
        rank: its place among all tokens by likelihood, and by id where they are equally likely; 1 is what greedy
            decoding takes.
        decoded_token: its text; None for requests without text.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True)
class EngineStats:
    """What an engine did since it was built; counts only.

    Attributes:
        num_steps: batches that ran.
        num_prefill_tokens: tokens computed in chunks: of a prompt, of a sequence computed again, or those that a
            grammar left no choice about.
        num_decode_tokens: tokens computed one a sequence.
        num_output_tokens: tokens of outputs.
        num_preemptions: sequences that lost their blocks.
        num_queried_tokens: tokens looked up in the prefix cache.
        num_hit_tokens: tokens found there.
    """

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One completion. Names follow vLLM.

    Attributes:
        index: which of the request's completions this is.
        text: the generated text, without the stop string or stop token that ended it, unless asked to include it.
        token_ids: the generated ids, the stop token included.
        cumulative_logprob: sum of the log-probabilities of the generated tokens; None unless `logprobs` was asked for.
        logprobs: for each generated token, log-probabilities by token id: its own and those of the likeliest; None
            unless asked for.
        finish_reason: `stop`, `length`, `abort`, `error`, or None while it goes on.
        stop_reason: the stop string or stop token id that ended it, or a sentence about the error; None for
            end-of-sequence and otherwise.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation of a prompt is, by the model alone.

    Attributes:
        token_ids: the continuation's.
        logprobs: natural logarithms of their probabilities, each given all tokens before it.
        is_greedy: whether greedy decoding would have taken these very tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.logprobs)


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds on the engine's clock, `time.perf_counter` by default, and what happened to it.

    Attributes:
        arrival_time: when it was added.
        first_token_time: when its first token reached the host; None if it has none.
        finished_time: when it ended.
        num_preemptions: how often it lost its KV blocks and was computed again.
    """

    arrival_time: float
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """What a request gave. Names follow vLLM; `output["text"]` and `output["token_ids"]` work as in nano-vLLM.

    Attributes:
        request_id: as given to `Engine.add_request`; `LLM.generate` numbers its requests.
        prompt: the prompt's text, None if it was given as token ids.
        prompt_token_ids: the prompt's token ids; one list for all outputs of a request.
        prompt_logprobs: for each of them, log-probabilities by token id: its own and those of the likeliest; None for
            the first, which nothing comes before, and for those before `prompt_logprobs_start`. None unless asked for.
        outputs: its completions.
        finished: whether it ended.
        num_cached_tokens: prompt tokens found in the prefix cache.
        metrics: times and counts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}: a RequestOutput has the keys 'text' and 'token_ids'")
        return getattr(self.outputs[0], key)
