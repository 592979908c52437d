"""Continuations whose likelihood is wanted, as requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.outputs import RequestOutput, Score
from nanoflow.core.text.detokenizer import IncrementalDetokenizer
from nanoflow.core.text.prompts import encode, needed
from nanoflow.core.text.tokenizer import Tokenizer

LEADS = ("", "\n", ".", ",", ")", "a", "z")  # characters that few tokens share with the beginning of a word


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt, `context`, and of its continuation.

    The request for them has the continuation's last token as its output, since the last one of all has to be computed
    no more than any other output, and allows nothing else. The tokens before it belong to the prompt. So a
    continuation of a single token, such as the letter of an answer, needs no more than one of `generate`'s steps.
    """

    context: list[int]
    continuation: list[int]

    def check(self, max_model_len: int) -> None:
        """Raise `RequestError` if the pair is too short or too long."""
        if not self.context:
            raise RequestError("The prompt is empty; give at least one token, such as that of the beginning of a text.")
        if not self.continuation:
            raise RequestError("The continuation is empty; give at least one token.")
        length = len(self.context) + len(self.continuation)
        if length > max_model_len:
            raise RequestError(
                f"The prompt and its continuation have {length} tokens, but max_model_len is {max_model_len}; shorten "
                f"the prompt by {length - max_model_len}."
            )

    @property
    def prompt(self) -> list[int]:
        """Token ids of the request's prompt."""
        return self.context + self.continuation[:-1]

    @property
    def params(self) -> SamplingParams:
        """How the request's only output token is chosen, and which log-probabilities it brings."""
        return SamplingParams(
            temperature=0.0, max_tokens=1, allowed_token_ids=self.continuation[-1:], logprobs=0, detokenize=False,
            prompt_logprobs=0 if len(self.continuation) > 1 else None, prompt_logprobs_start=len(self.context),
        )  # fmt: skip

    def score(self, output: RequestOutput) -> Score:
        """What the request's output says."""
        entries = [*(output.prompt_logprobs or ())[len(self.context) :], *(output.outputs[0].logprobs or ())]
        found = [entry[token_id] for entry, token_id in zip(entries, self.continuation, strict=True) if entry]
        return Score(self.continuation, [one.logprob for one in found], all(one.rank == 1 for one in found))


def pairs(tokenizer: Tokenizer | None, prompts: Sequence[Any], continuations: Sequence[Any]) -> list[Pair]:
    """Token ids of prompts and their continuations, texts or ids.

    Raises:
        RequestError: something is neither, or there is not one continuation for each prompt.
    """
    if len(prompts) != len(continuations):
        raise RequestError(
            f"There are {len(prompts)} prompts but {len(continuations)} continuations; give one for each prompt."
        )
    return [
        _pair(tokenizer, prompt, continuation, index)
        for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True))
    ]


def _pair(tokenizer: Tokenizer | None, prompt: Any, continuation: Any, index: int) -> Pair:
    text, context = encode(tokenizer, prompt, index)
    if not isinstance(continuation, str):
        return Pair(context, encode(tokenizer, continuation, index)[1])
    tokenizer = needed(tokenizer, "a continuation in words needs")
    if text is not None:
        whole = tokenizer.encode(text + continuation)
        if whole[: len(context)] == context:
            return Pair(context, whole[len(context) :])
    own = _own_token_ids(tokenizer, context, continuation)
    if own is None and text is None:
        own = tokenizer.encode(continuation, add_special_tokens=False)
    if own is None:
        raise RequestError(
            f"Prompt {index} ends, and its continuation {continuation!r:.60} begins, within a token; give both as "
            f"token ids, or move the border between them."
        )
    return Pair(context, own)


def _own_token_ids(tokenizer: Tokenizer, context: list[int], continuation: str) -> list[int] | None:
    """Token ids that spell the continuation after those of a prompt, of which none is shared with it.

    They are those of the continuation alone, but some tokenizers put a space before a text, so it is tried behind
    other characters as well. None if nothing spells it.
    """
    for lead in LEADS:
        start = tokenizer.encode(lead, add_special_tokens=False)
        token_ids = tokenizer.encode(lead + continuation, add_special_tokens=False)
        if token_ids[: len(start)] == start:
            spelled = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, prompt_token_ids=context)
            if spelled.push(token_ids[len(start) :], is_end=True) == continuation:
                return token_ids[len(start) :]
    return None
