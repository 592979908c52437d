"""Threads for what would hold up an event loop: tokenizing, rendering chats, checking requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nanoflow.core.config.sampling_params import SamplingParams

T = TypeVar("T")

NUM_THREADS = 2  # of each kind
LIGHT = 4096  # characters, or token ids, that are worth no thread
HEAVY = 65536  # characters of a prompt and of what its output must match, from which on others should not wait for it


class Workers:
    """Threads that prepare requests. What is heavy has some of its own, so that all else need not wait for it."""

    def __init__(self) -> None:  # threads start when there is work, and end when nobody holds this any more
        self._quick = ThreadPoolExecutor(NUM_THREADS, "nanoflow-prepare")
        self._heavy = ThreadPoolExecutor(NUM_THREADS, "nanoflow-prepare-heavy")

    async def run(self, weigh: Callable[[], int], job: Callable[[], T]) -> T:
        """What the job gives, in a thread that is chosen by how many characters it is about."""
        loop = asyncio.get_running_loop()
        weight = await loop.run_in_executor(self._quick, weigh)
        return await loop.run_in_executor(self._quick if weight < HEAVY else self._heavy, job)

    def close(self) -> None:
        """End the threads once they are done with what they are at."""
        for pool in (self._quick, self._heavy):
            pool.shutdown(wait=False)


def is_light(prompt: Any, params: SamplingParams) -> bool:
    """Whether encoding a prompt and checking its parameters takes less time than handing it to a thread."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt") or prompt.get("prompt_token_ids")
    size = len(prompt) if hasattr(prompt, "__len__") else 0
    more = (params.structured_outputs, params.logits_processors, params.bad_words, params.allowed_token_ids)
    return size <= LIGHT and not any(more) and len(params.logit_bias or ()) + len(params.stop_token_ids or ()) <= LIGHT


def weight_of(prompt: Any, params: SamplingParams) -> int:
    """About how many characters a prompt, or a conversation, and what its output must match have."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt") or prompt.get("prompt_token_ids")
    size = len(prompt) if isinstance(prompt, str) else len(repr(prompt))
    structured = params.structured_outputs
    return size + (0 if structured is None else len(repr(getattr(structured, structured.kind))))
