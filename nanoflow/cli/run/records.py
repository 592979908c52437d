"""The record of a prompt: a JSON object on a line of the output file, in the order of the prompts."""

from __future__ import annotations

import json
import math
from typing import Any

from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.run.batch import Completed
from nanoflow.core.data.outputs import CompletionOutput, Logprob


def line(completed: Completed) -> bytes:
    """The record of a prompt; `completions` holds all of them if there are several."""
    given, number, result = completed
    record = {
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_token_ids,
        **_completion(result.outputs[0]),
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_output_tokens": sum(len(completion.token_ids) for completion in result.outputs),
        "num_cached_tokens": result.num_cached_tokens,
        "ttft": result.metrics.ttft,
    }
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(map(_logprobs, result.prompt_logprobs))
    if len(result.outputs) > 1:
        record["completions"] = [_completion(completion) for completion in result.outputs]
    length = len(result.prompt_token_ids)
    return _written(_start(given, length) | record | _shown(given, length) | {"index": number, **given.own}) + b"\n"


def is_of(line: bytes, given: GivenPrompt) -> bool:
    """Whether a line of an output file is the record of a prompt."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    return all(record.get(key) == value for key, value in _shown(given, record.get("num_prompt_tokens")).items())


def begins(line: bytes, given: GivenPrompt) -> bool:
    """Whether the end of an output file may be the beginning of the record of a prompt."""
    start = _start(given, None)
    return any(line.startswith(text.removesuffix(b"}")[: len(line)]) for text in (_written(start), _ascii(start)))


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        record["cumulative_logprob"] = _finite(completion.cumulative_logprob)
        record["logprobs"] = list(map(_logprobs, completion.logprobs))
    return record


def _logprobs(of_token: dict[int, Logprob] | None) -> dict[int, dict[str, Any]] | None:
    """By token id, which JSON writes as a text."""
    if of_token is None:
        return None
    return {
        token_id: {"logprob": _finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
        for token_id, found in of_token.items()
    }


def _finite(number: float | None) -> float | None:
    """JSON has no infinities."""
    return number if number is not None and math.isfinite(number) else None


def _start(given: GivenPrompt, length: int | None) -> dict[str, Any]:
    """The first keys of a record, by which one that was cut is known again."""
    shown = _shown(given, length)
    return shown if "messages" in shown else {"prompt": None} | shown


def _shown(given: GivenPrompt, length: int | None) -> dict[str, Any]:
    """What a record shows of a prompt, of its token ids those that truncation leaves.

    Where the engine says how many these are, `length` is that number, and None leaves them out.
    """
    ids, most = given.prompt.get("prompt_token_ids"), given.params.truncate_prompt_tokens
    if not isinstance(ids, list) or most is None:
        return given.prompt
    length = most if most > 0 else length
    return {"prompt_token_ids": ids[-length:]} if length else {}


def _written(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # halves of characters, which UTF-8 can't write
        return _ascii(record)


def _ascii(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()
