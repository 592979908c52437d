"""Completing any number of prompts in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanoflow.cli.prompts_file import PromptAndParams
from nanoflow.core.config.errors import RequestError
from nanoflow.core.data.outputs import RequestOutput

if TYPE_CHECKING:
    from nanoflow.core.api.llm import LLM

MAX_PENDING = 1024  # requests in the engine, and ended ones that wait for an earlier one: a few full batches


def completions(
    llm: LLM, prompts: Iterator[PromptAndParams], num_done: int = 0, max_pending: int = MAX_PENDING
) -> Iterator[RequestOutput]:
    """Outputs in the order of the prompts, which are read when there is room for them.

    Args:
        llm: has nothing else to do meanwhile.
        prompts: those that are still to be completed.
        num_done: how many came before these. Seeds are those of a run that completes all at once.
        max_pending: most requests to hold at a time.

    Raises:
        RequestError: a prompt that can't be served. Those before it have been yielded then.
    """
    engine = llm.engine
    engine.num_requests = num_done
    pending: deque[str] = deque()  # ids in the order of the prompts
    ended: dict[str, RequestOutput] = {}
    number, refusal = num_done, None
    try:
        while True:
            while refusal is None and len(pending) < max_pending and (pair := next(prompts, None)) is not None:
                try:
                    text, token_ids = llm.encode(pair[0], number)
                    engine.add_request(str(number), token_ids, pair[1], text)
                except RequestError as error:
                    place = "" if str(error).startswith("Prompt ") else f"Prompt {number}: "
                    refusal = RequestError(f"{place}{error}")
                else:
                    pending.append(str(number))
                    number += 1
            if not pending:
                break
            ended |= {output.request_id: output for output in engine.step()}
            while pending and pending[0] in ended:
                yield ended.pop(pending.popleft())
    finally:
        for request_id in pending:
            engine.abort(request_id)
    if refusal is not None:
        raise refusal
