"""`Sequence`: one request on its way through the engine. Shape suffixes are explained in docs/glossary.md."""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.constraint import Constraint
from nanoflow.core.data.scored import Scored

NOTHING_TO_SAMPLE = (
    "No token could be sampled, since the logits are NaN or infinite; "
    "check the checkpoint's weights and the dtype, or allow more tokens."
)


@dataclass(eq=False, repr=False, slots=True)
class Sequence(Scored):
    """One request on its way through the engine: its tokens, its blocks, and how far it got.

    Counts and values are kept apart. A step that was submitted but whose result was not yet taken has already moved
    the counts (`num_tokens`, `num_computed_tokens`), while `token_ids` holds only the values the host has seen. So the
    scheduler, which looks at counts alone, can plan step n+1 while step n is still on the GPU. Log-probabilities are
    those of `Scored`.

    Attributes:
        request_id: the caller's name for the request, unique among unfinished requests.
        token_ids: known values: the prompt, then the output so far.
        params: as the caller gave them.
        max_tokens: most output tokens; `params.max_tokens` cut to what `max_model_len` leaves.
        stop_token_ids: ids that end the request, end-of-sequence ids included unless ignored.
        seed: 64-bit seed of its random numbers.
        cache_identity: what cached blocks must agree in beside the tokens to be shared with it; empty for nothing.
        block_table: ids of its KV blocks in order; written by the block manager alone.
        prefix_keys: scratch space of the block manager; outlives preemption, since known tokens never change.
        prefix_match: scratch space of the block manager: what it found in the cache when it was last asked.
        num_computed_tokens: leading tokens whose keys and values are in the cache, or will be when all submitted steps
            have run.
        num_in_flight: output tokens that submitted steps will bring.
        num_cached_tokens: prompt tokens that the prefix cache held when the request was first admitted; -1 before.
        num_preemptions: how often it lost its blocks.
        slot: its place in the runner's buffers, -1 for none; written by the runner alone.
        constraint: what its output is held to, and how far it got; None for nothing.
        needs_values: whether what may be sampled depends on the values of all tokens before; so none may be in flight.
        samples_all: whether tokens are sampled even where the constraint leaves no choice.
        finish_reason: None while unfinished, else `stop`, `length`, `abort` or `error`.
        stop_reason: the stop string or the stop token id that ended it, or what the error was; None for
            end-of-sequence, and where the constraint leaves no more to say.
        arrival_time: when it was added, in seconds on the engine's clock; written by the engine alone.
        first_token_time: when its first token reached the host, on the same clock; None before.
    """

    request_id: str
    prompt_token_ids: InitVar[list[int]]
    params: SamplingParams
    _: KW_ONLY
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    cache_identity: bytes = b""
    arrival_time: float = 0.0
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(init=False, default_factory=list)
    prefix_keys: list[Any] = field(init=False, default_factory=list)
    prefix_match: Any = field(init=False, default=None)
    num_computed_tokens: int = field(init=False, default=0)
    num_in_flight: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=-1)
    num_preemptions: int = field(init=False, default=0)
    slot: int = field(init=False, default=-1)
    constraint: Constraint | None = field(init=False, default=None)
    needs_values: bool = field(init=False, default=False)
    samples_all: bool = field(init=False)
    finish_reason: str | None = field(init=False, default=None)
    stop_reason: str | int | None = field(init=False, default=None)
    first_token_time: float | None = field(init=False, default=None)

    def __post_init__(self, prompt_token_ids: list[int]) -> None:
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.samples_all = self.params.logprobs is not None
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * min(max(1, self.params.prompt_logprobs_start), self.num_prompt_tokens)

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

        If it `needs_values`, it is also 0 while a token is in flight: what may follow depends on its value.
        """
        if self.num_output_tokens >= self.max_tokens or (self.needs_values and self.num_in_flight):
            return 0
        return len(self.token_ids) + self.num_in_flight - self.num_computed_tokens

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

    @property
    def hides_last_token(self) -> bool:
        """Whether the last token is a stop token that ended the request, and no part of the text."""
        ended_by_token = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        in_text = self.params.include_stop_str_in_output
        return ended_by_token and not in_text and self.token_ids[-1] in self.stop_token_ids

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

        A value below 0 says that none could be sampled, which ends the request with an error.

        Tokens that its constraint leaves no choice about are appended too, and are computed with the next step's; not
        so where each token has to be sampled, for its log-probability or to be counted.

        Returns:
            How many tokens were appended.
        """
        num_before = len(self.token_ids)
        self.num_in_flight -= 1
        if token_id < 0:
            self.finish("error", NOTHING_TO_SAMPLE)
            return 0
        self._append(token_id)
        if self.constraint is not None and not self.samples_all and not self.is_finished:
            for forced_id in self.constraint.forced():
                self._append(forced_id)
                if self.is_finished:
                    break
        return len(self.token_ids) - num_before

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if self.constraint is not None and not self.constraint.accept(token_id):
            self.finish("error", self.constraint.error)
        elif token_id in self.stop_token_ids and num_output >= self.params.min_tokens:
            self.finish("stop", token_id if token_id in (self.params.stop_token_ids or ()) else None)
        elif self.constraint is not None and self.constraint.is_complete:
            self.finish("stop")
        elif num_output >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        """End the request: `stop`, `length`, `abort` or `error`. The scheduler lets go of it at the next `update`."""
        self.finish_reason, self.stop_reason = reason, stop_reason
