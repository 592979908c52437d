"""The data that flows through the engine.

Shape suffixes, here and everywhere: T tokens in the batch, S sequences in the batch, N query heads, K key/value heads,
H head dim, D hidden size, V vocabulary, B blocks, P block size (tokens in a block), L context length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from nanoflow.core.config import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import torch

    from nanoflow.core.structured import Grammar


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


class Sequence:
    """One request on its way through the engine: its tokens, its blocks, and how far it got.

    Counts and values are kept apart. A step that was submitted but whose result was not yet taken has already moved
    the counts (`num_tokens`, `num_computed_tokens`), while `token_ids` holds only the values the host has seen. So the
    scheduler, which looks at counts alone, can plan step n+1 while step n is still on the GPU.

    Attributes:
        request_id: the caller's name for the request, unique among unfinished requests.
        token_ids: known values: the prompt, then the output so far.
        num_prompt_tokens: how many of `token_ids` are the prompt.
        params: as the caller gave them.
        max_tokens: most output tokens; `params.max_tokens` cut to what `max_model_len` leaves.
        stop_token_ids: ids that end the request, end-of-sequence ids included unless ignored.
        bad_words: token ids of what its output must not hold.
        seed: 64-bit seed of its random numbers.
        block_table: ids of its KV blocks in order; written by the block manager alone.
        prefix_keys: scratch space of the block manager; outlives preemption, since known tokens never change.
        num_computed_tokens: leading tokens whose keys and values are in the cache, or will be when all submitted steps
            have run.
        num_in_flight: output tokens that submitted steps will bring.
        num_cached_tokens: prompt tokens that the prefix cache held when the request was first admitted; -1 before.
        num_preemptions: how often it lost its blocks.
        row: its row in the runner's buffers, -1 for none; written by the runner alone.
        logprobs: for each known output token, log-probabilities by token id; empty unless the request asks for them.
        prompt_logprobs: the same for the tokens of the prompt so far; the first has None, and so have those before
            `prompt_logprobs_start`. None unless asked for.
        grammar: what its output must match, and how far it got; None for anything.
        finish_reason: None while unfinished, else `stop`, `length`, `abort` or `error`.
        stop_reason: the stop string or the stop token id that ended it, or what the error was; None for
            end-of-sequence, and where the grammar leaves no more to say.
    """

    __slots__ = (
        "arrival_time", "bad_words", "block_table", "finish_reason", "finish_time", "first_token_time", "grammar",
        "logprobs", "max_tokens", "num_cached_tokens", "num_computed_tokens", "num_in_flight", "num_preemptions",
        "num_prompt_tokens", "params", "prefix_keys", "prompt_logprobs", "request_id", "row", "seed", "stop_reason",
        "stop_token_ids", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        bad_words: Iterable[list[int]] = (),
        seed: int = 0,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        self.bad_words = list(bad_words)
        self.seed = seed
        self.block_table: list[int] = []
        self.prefix_keys: list[Any] = []
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens = -1
        self.num_preemptions = 0
        self.row = -1
        self.logprobs: list[dict[int, Logprob]] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * min(max(1, params.prompt_logprobs_start), self.num_prompt_tokens)
        self.grammar: Grammar | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.arrival_time = time.perf_counter()
        self.first_token_time: float | None = None
        self.finish_time: float | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, prompt={self.num_prompt_tokens}, tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, blocks={len(self.block_table)}, finish={self.finish_reason})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.token_ids) + self.num_in_flight - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that must still go through the model before the next token can be sampled; 0 once no more will be.

        With a grammar it is also 0 while a token is in flight: what may follow depends on its value.
        """
        if self.num_output_tokens >= self.max_tokens or (self.grammar is not None and self.num_in_flight):
            return 0
        return len(self.token_ids) + self.num_in_flight - self.num_computed_tokens

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be had."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    @property
    def num_skippable_tokens(self) -> int:
        """Leading tokens that need not go through the model if the cache holds them, since nobody needs their logits:
        all but the last token; those that log-probabilities were taken from while some of the prompt's are missing."""
        if self.prompt_logprobs is not None and self.needs_prompt_logits:
            return len(self.prompt_logprobs) - 1
        return self.num_tokens - 1

    @property
    def output_token_ids(self) -> list[int]:
        """Known values of the output."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether the request ended, for whatever reason."""
        return self.finish_reason is not None

    def advance(self, num_tokens: int) -> bool:
        """Count `num_tokens` as computed by a step about to be submitted; True if that step samples a token."""
        if self.num_cached_tokens < 0:
            self.num_cached_tokens = self.num_computed_tokens
        self.num_computed_tokens += num_tokens
        samples = self.num_computed_tokens == len(self.token_ids) + self.num_in_flight
        self.num_in_flight += samples
        return samples

    def append_token(self, token_id: int) -> int:
        """Take the value of the oldest token in flight, and end the request if that value or its count says so.

        Tokens that its grammar leaves no choice about are appended too, and are computed with the next step's; not so
        where each token has to be drawn, for its log-probability or to be counted.

        Returns:
            How many tokens were appended.
        """
        num_before = len(self.token_ids)
        self.num_in_flight -= 1
        if num_before == self.num_prompt_tokens:
            self.first_token_time = time.perf_counter()
        self._append(token_id)
        jumps = self.params.penalties is None and self.params.logprobs is None
        if self.grammar is not None and jumps and not self.is_finished:
            for forced_id in self.grammar.forced():
                self._append(forced_id)
                if self.is_finished:
                    break
        return len(self.token_ids) - num_before

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if self.grammar is not None and not self.grammar.accept(token_id):
            self.finish("error", self.grammar.error)
        elif token_id in self.stop_token_ids and num_output >= self.params.min_tokens:
            self.finish("stop", token_id if token_id in (self.params.stop_token_ids or ()) else None)
        elif self.grammar is not None and self.grammar.is_complete:
            self.finish("stop")
        elif num_output >= self.max_tokens:
            self.finish("length")

    def add_logprobs(self, position: int, logprobs: list[dict[int, Logprob]]) -> None:
        """Take log-probabilities of the tokens from `position` on, of the prompt or of the output.

        Those of a prompt come again if it was computed again; what is there already stays.
        """
        if position >= self.num_prompt_tokens:
            self.logprobs += logprobs
        elif self.prompt_logprobs is not None:
            self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - position :]

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        """End the request: `stop`, `length`, `abort` or `error`. The scheduler lets go of it at the next `update`."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.finish_time = time.perf_counter()


@dataclass(slots=True)
class Batch:
    """What one step computes: for each sequence, tokens `starts[i]` to `starts[i] + num_tokens[i]`.

    Decoding sequences, which have one token, come first, so that a backend can serve them with its decode kernel;
    chunks of any length follow.

    Attributes:
        sequences: S sequences, each at most once.
        starts: S positions of the first new token.
        num_tokens: S counts of new tokens, each at least 1.
        samples: S flags: whether the chunk reaches the sequence's end, so that a token is sampled.
        preempted: sequences that lost their blocks since the previous batch.
    """

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Append the sequence's next `num_tokens` tokens, and count them as computed (`Sequence.advance`)."""
        self.sequences.append(sequence)
        self.starts.append(sequence.num_computed_tokens)
        self.num_tokens.append(num_tokens)
        self.samples.append(sequence.advance(num_tokens))

    @property
    def total_tokens(self) -> int:
        """T."""
        return sum(self.num_tokens)

    @property
    def num_decodes(self) -> int:
        """How many leading sequences have exactly one new token."""
        return next((i for i, n in enumerate(self.num_tokens) if n > 1), len(self.num_tokens))


@dataclass(slots=True)
class AttentionInput:
    """Where the tokens of a batch lie in the KV cache; what `AttentionBackend.plan` gets once a step.

    Tensors are on the engine's device. `query_lens` and `context_lens` are the same facts on the host, for decisions
    that must not wait for the device. In a captured step, whose tensors' content changes from replay to replay, they
    are upper bounds, and `num_decodes` is 0 unless all sequences always decode.

    Attributes:
        slot_mapping_T: int64; token t's keys and values go to block `slot // P`, place `slot % P`.
        query_start_S1: int32, S + 1 entries; sequence s has tokens `query_start[s]` to `query_start[s + 1]`. In a
            captured step the last sequences may have none.
        context_lens_S: int32; tokens of sequence s in the cache once this batch's are stored.
        block_tables_SB: int32; block ids of each sequence. Entries past its context are valid ids with any content.
        query_lens: int64 numpy array, S entries.
        context_lens: int64 numpy array, S entries.
        num_decodes: how many leading sequences are known to have exactly one new token.
        settled: every sequence decodes, and what it attends to, its new token apart, was stored by earlier steps. So
            storing and attending may go together, sequence by sequence.
    """

    slot_mapping_T: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    query_lens: np.ndarray
    context_lens: np.ndarray
    num_decodes: int
    settled: bool = False

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.query_lens)


@dataclass(slots=True)
class Projection:
    """What a layer's QKV projection gave, and what is to be done with it before attention.

    Attributes:
        qkv_TE: E = (N + 2K) * H: query heads, then key heads, then value heads; any row stride.
        q_weight_H, k_weight_H: weights of the RMS norms over each query and key head; None for no norm.
        eps: of both norms.
        cos_LH, sin_LH: float32 tables of cosines and signed sines, by position.
        positions_T: int64; row of the tables for each token.
    """

    qkv_TE: torch.Tensor
    q_weight_H: torch.Tensor | None
    k_weight_H: torch.Tensor | None
    eps: float
    cos_LH: torch.Tensor
    sin_LH: torch.Tensor
    positions_T: torch.Tensor


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
    """Times of one request in seconds on `time.perf_counter`'s clock, and what happened to it.

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
        prompt_token_ids: the prompt's token ids.
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
