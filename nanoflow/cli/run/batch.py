"""Completing any number of prompts in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.core.config.errors import RequestError
from nanoflow.core.data.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow.core.text.chats import encode_chat

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM

MAX_PENDING = 1024  # requests in the engine, and ended ones that wait for an earlier one: a few full batches


class Completed(NamedTuple):
    """A prompt, its place among all, and what came of it."""

    given: GivenPrompt
    number: int
    output: RequestOutput


def completions(
    llm: LLM,
    prompts: Iterator[GivenPrompt],
    num_done: int = 0,
    max_pending: int = MAX_PENDING,
    *,
    records_errors: bool = False,
) -> Iterator[Completed]:
    """What came of the prompts, in their order; they are read when there is room for them.

    Args:
        llm: has nothing else to do meanwhile.
        prompts: those that are still to be completed.
        num_done: how many came before these. Seeds are those of a run that completes all at once.
        max_pending: most requests to hold at a time.
        records_errors: a prompt that can't be served has an output whose finish_reason is `error` and whose
            stop_reason says why.

    Raises:
        RequestError: a prompt that can't be served. Those before it have been yielded then.
    """
    engine = llm.engine
    engine.num_requests = num_done
    pending: deque[tuple[int, GivenPrompt]] = deque()  # in the order of the prompts
    ended: dict[str, RequestOutput] = {}
    number, refusal = num_done, None
    try:
        while True:
            while refusal is None and len(pending) < max_pending and (given := next(prompts, None)) is not None:
                try:
                    text, token_ids = encoded(llm, given, number)
                    engine.add_request(str(number), token_ids, given.params, text)
                except RequestError as error:
                    if records_errors:
                        ended[str(number)] = _refused(given, number, str(error))
                    else:
                        place = "" if str(error).startswith("Prompt ") else f"Prompt {number}: "
                        refusal = RequestError(f"{place}{error}")
                        continue
                pending.append((number, given))
                number += 1
            if not pending:
                break
            if str(pending[0][0]) not in ended:
                ended |= {output.request_id: output for output in engine.step()}
            while pending and str(pending[0][0]) in ended:
                place_of, of = pending.popleft()
                yield Completed(of, place_of, ended.pop(str(place_of)))
    finally:
        for place_of, _ in pending:
            engine.abort(str(place_of))
    if refusal is not None:
        raise refusal


def encoded(llm: LLM, given: GivenPrompt, number: int) -> tuple[str | None, list[int]]:
    """Text, if there is one, and token ids of a prompt, or of a conversation as the chat template writes it.

    Raises:
        RequestError: it can't be served.
    """
    if "messages" not in given.prompt:
        return llm.encode(given.prompt, number)
    return encode_chat(llm.engine.tokenizer, given.prompt["messages"], **given.template)


def _refused(given: GivenPrompt, number: int, sentence: str) -> RequestOutput:
    """The output of a prompt that was never served."""
    text, token_ids = given.prompt.get("prompt"), given.prompt.get("prompt_token_ids")
    return RequestOutput(
        request_id=str(number),
        prompt=text,
        prompt_token_ids=token_ids if isinstance(token_ids, list) else [],
        outputs=[CompletionOutput(0, "", [], finish_reason="error", stop_reason=sentence)],
        finished=True,
        num_cached_tokens=0,
        metrics=RequestMetrics(time.perf_counter(), None, None, 0),
    )
