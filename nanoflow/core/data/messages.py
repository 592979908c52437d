"""The engine's messages: commands that go into the step loop, and updates that come out of it.

All of them are plain data, which `msgspec` and `pickle` encode: no live objects, no functions. So whoever sends
commands and reads updates may be another thread or another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.outputs import Logprob


@dataclass(slots=True)
class AddRequest:
    """Command: queue a request, which `Admission.request` has checked.

    Attributes:
        request_id: not that of an unfinished request.
        prompt_token_ids: at least one id; what is to be cut off the prompt is.
        params: how to sample. Every integer in it has at most 64 bits.
        max_tokens: most output tokens.
        seeds: signed 64-bit seeds of its `n` completions; None: the engine gives them.
        prompt: the prompt's text, to be handed through to the output; None if it has none.
        output_kind: whether outputs come step by step, and what they hold.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seeds: list[int] | None = None
    prompt: str | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY


@dataclass(slots=True)
class AbortRequest:
    """Command: end a request with what it has. Nothing happens if there is no such unfinished request."""

    request_id: str


@dataclass(slots=True)
class Stop:
    """Command: abort what is unfinished, and end the step loop."""


Command: TypeAlias = "AddRequest | AbortRequest | Stop"


@dataclass(slots=True)
class Update:
    """What a step, or several, brought to one completion of a request.

    Attributes:
        request_id: whose completion it is.
        index: which of its completions.
        token_ids: new ones; all of the output for a request that shows only its end.
        num_hidden: how many of the last of them are no part of the text: 1 for a stop token, else 0.
        text: what they add to the text, where the loop looks for stop strings in it; None where it is to be decoded.
        logprobs: of the new tokens, as in `CompletionOutput`; None unless asked for.
        prompt_logprobs: of tokens of the prompt that no earlier update brought; None unless asked for.
        finish_reason, stop_reason: as in `CompletionOutput`.
        num_cached_tokens: tokens of the prompt that the prefix cache held.
        num_preemptions: how often this completion lost its blocks.
        arrival_time, first_token_time, finish_time: as in `RequestMetrics`, of this completion.
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_hidden: int = 0
    text: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    first_token_time: float | None = None
    finish_time: float | None = None


@dataclass(slots=True)
class Refusal:
    """A request that the loop could not add; no update comes for it.

    Attributes:
        request_id: whose.
        message: one sentence for the caller.
    """

    request_id: str
    message: str


def merged(updates: list[Update | Refusal]) -> list[Update | Refusal]:
    """The same with one update a completion, in the order of the first ones, which take the others in."""
    found: dict[tuple[str, int], Update | Refusal] = {}
    for update in updates:
        if isinstance(update, Refusal):
            found[update.request_id, -1] = update
            continue
        first = found.setdefault((update.request_id, update.index), update)
        if first is not update:
            found[update.request_id, update.index] = _joined(first, update)
    return list(found.values())


def _joined(first: Update, second: Update) -> Update:
    """`second`, with what `first` brought before it."""
    second.token_ids = first.token_ids + second.token_ids
    if first.text is not None:
        second.text = first.text + (second.text or "")
    if first.logprobs is not None:
        second.logprobs = first.logprobs + (second.logprobs or [])
    if first.prompt_logprobs is not None:
        second.prompt_logprobs = first.prompt_logprobs + (second.prompt_logprobs or [])
    return second
