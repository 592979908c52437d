"""Integers of any size that callers give, as 64-bit ones that messages can carry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import xxhash

from nanoflow.core.config.sampling_params import SamplingParams

# Fields of `SamplingParams` that take any integer, and mean the same when cut to 64 bits.
INTEGERS = ("top_k", "logprobs", "prompt_logprobs", "prompt_logprobs_start", "truncate_prompt_tokens", "priority")


def nth_seed(seed: int, index: int) -> int:
    """The signed 64-bit seed of a request's completion: the first one's is the request's own."""
    if index > 0:
        seed = xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode())
    return (seed + 2**63) % 2**64 - 2**63


def in_64_bits(params: SamplingParams) -> SamplingParams:
    """The same parameters with no integer of more than 64 bits."""
    changes: dict[str, Any] = {}
    for name in INTEGERS:
        value = getattr(params, name)
        if value is not None and not -(2**63) <= value < 2**63:
            changes[name] = max(-(2**63), min(value, 2**63 - 1))
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        changes["seed"] = nth_seed(params.seed, 0)
    if params.max_tokens is not None and params.max_tokens >= 2**63:
        changes["max_tokens"] = None
    return replace(params, **changes) if changes else params
