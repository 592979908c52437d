"""A request in the step loop: its sequences, and what updates say of them."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.core.config.sampling_params import RequestOutputKind
from nanoflow.core.data.messages import AddRequest, Update
from nanoflow.core.data.sequence import Sequence


def make_sequences(
    command: AddRequest, names: list[str], seeds: list[int], stop_token_ids: frozenset[int], now: float
) -> list[Sequence]:  # fmt: skip
    """A sequence for each completion of a request, with these names and seeds."""
    params = command.params
    # What is asked about the prompt, one of them tells for all.
    others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
    return [
        Sequence(
            name,
            command.prompt_token_ids,
            others if index else params,
            max_tokens=command.max_tokens,
            stop_token_ids=stop_token_ids,
            seed=seeds[index],
            cache_identity=(params.cache_salt or "").encode(),
            arrival_time=now,
        )
        for index, name in enumerate(names)
    ]


class Request:
    """One request and its sequences, one for each of its `n` completions.

    Args:
        command: what the caller asked for.
        sequences: in the order of the completions' indices.

    Attributes:
        streams: whether there are outputs before it has ended.
        num_unfinished: sequences that have not ended.
        num_scored: tokens of the prompt whose log-probabilities are in an update.
    """

    def __init__(self, command: AddRequest, sequences: list[Sequence]) -> None:
        self.request_id = command.request_id
        self.sequences = sequences
        self.streams = command.output_kind is not RequestOutputKind.FINAL_ONLY
        self.num_unfinished = len(sequences)
        self.num_scored = 0

    def update(self, index: int, first: int, text: str | None, now: float) -> Update:
        """What its caller shall know of the sequence at `index`.

        Args:
            index: which of its sequences.
            first: place in `Sequence.token_ids` of the first token that no update has brought yet.
            text: what the tokens from there on add to the text; None where it is yet to be decoded.
            now: on the engine's clock; when the sequence ended, if it has.
        """
        sequence, scored = self.sequences[index], self.sequences[0].prompt_logprobs
        logprobs = None
        if sequence.params.logprobs is not None:
            num_prompt = sequence.num_prompt_tokens
            logprobs = sequence.logprobs[first - num_prompt : len(sequence.token_ids) - num_prompt]
        if scored is not None:
            scored, self.num_scored = scored[self.num_scored :], len(scored)
        finish_reason = sequence.finish_reason
        return Update(
            self.request_id,
            index,
            sequence.token_ids[first:],
            int(finish_reason is not None and sequence.hides_last_token),
            text,
            logprobs,
            scored,
            finish_reason,
            sequence.stop_reason,
            max(0, self.sequences[0].num_cached_tokens),
            sequence.num_preemptions,
            sequence.arrival_time,
            sequence.first_token_time,
            None if finish_reason is None else now,
        )
