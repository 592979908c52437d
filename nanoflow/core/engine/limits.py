"""Limits of what one request may ask for: what it would cost falls on others, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.config.sampling_params import SamplingParams, StructuredOutputsParams

LIMITED = (  # the fields of which there may be too much, beside `n`; where they are None, 0 or empty, there is not
    "logprobs", "prompt_logprobs", "logit_bias", "stop", "bad_words", "cache_salt", "structured_outputs",
    "allowed_token_ids", "stop_token_ids",
)  # fmt: skip


def check_limits(params: SamplingParams, limits: EngineConfig, vocab_size: int) -> None:
    """Whether sampling parameters keep to the engine's limits.

    Raises:
        RequestError: they don't; names the field, the limit, and the option that raises it.
    """
    for field, amount, option, what in _amounts(params, vocab_size):
        limit = getattr(limits, option)
        if amount > limit:
            raise RequestError(
                f"{field} may have at most {limit}{what}, got {shown(amount)}; ask for less, or raise engine.{option}."
            )
    for field in ("allowed_token_ids", "stop_token_ids"):
        length = len(getattr(params, field) or ())
        if length > vocab_size:
            raise RequestError(f"{field} has {length} entries, but the vocabulary only {vocab_size} tokens.")


def _amounts(params: SamplingParams, vocab_size: int) -> Iterator[tuple[str, int, str, str]]:
    """What a request asks for: the field, how much, the option that limits it, and what is counted."""
    yield "n", params.n, "max_n", ""
    for field in ("logprobs", "prompt_logprobs"):
        value = getattr(params, field)
        if value is not None:
            yield field, vocab_size if value < 0 else min(value, vocab_size), f"max_{field}", " candidates"
    yield "logit_bias", len(params.logit_bias or ()), "max_logit_bias", " entries"
    for field, texts in (("stop", params.stop or ()), ("bad_words", params.bad_words or ())):
        yield field, len(texts), f"max_{field}", " texts"
        yield f"A text of {field}", max(map(len, texts), default=0), "max_text_length", " characters"
    yield "cache_salt", len(params.cache_salt or ""), "max_text_length", " characters"
    if params.structured_outputs is not None:
        kind = f"structured_outputs.{params.structured_outputs.kind}"
        yield kind, length_of(params.structured_outputs), "max_grammar_length", " characters"


def length_of(structured: StructuredOutputsParams) -> int:
    """How many characters a schema, the texts of a choice, a regex or a grammar have."""
    value: Any = getattr(structured, structured.kind)
    if structured.kind == "choice":
        return sum(map(len, value))
    return len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False))
