"""Requests that arrive over time, and how long each of them waited."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from nanoflow.bench.options import ServingOptions
from nanoflow.bench.workloads import random_ids
from nanoflow.core.config import SamplingParams
from nanoflow.core.engine import Engine
from nanoflow.core.types import RequestOutput

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes.

    Attributes:
        time: seconds after the start.
        prompt: token ids.
        params: how to sample.
    """

    time: float
    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Served:
    """What became of a request; times in seconds.

    Attributes:
        priority: its `SamplingParams.priority`.
        prompt_tokens, output_tokens: how many.
        cached_tokens: tokens of its prompt that the prefix cache held.
        preemptions: how often it lost its blocks.
        ttft: from its arrival to its first token.
        tpot: mean time between its later tokens; None if there is one token only.
        e2e: from its arrival to its end.
    """

    priority: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    ttft: float
    tpot: float | None
    e2e: float

    @classmethod
    def of(cls, output: RequestOutput, priority: int, arrival: float) -> Served:
        """From a finished output and the moment of its arrival on `time.perf_counter`'s clock."""
        metrics, num_tokens = output.metrics, len(output["token_ids"])
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        decoding = metrics.finished_time - metrics.first_token_time
        return cls(
            priority=priority,
            prompt_tokens=len(output.prompt_token_ids),
            output_tokens=num_tokens,
            cached_tokens=output.num_cached_tokens,
            preemptions=metrics.num_preemptions,
            ttft=metrics.first_token_time - arrival,
            tpot=decoding / (num_tokens - 1) if num_tokens > 1 else None,
            e2e=metrics.finished_time - arrival,
        )


def families(options: ServingOptions, sampling: SamplingParams, vocab_size: int) -> list[Arrival]:
    """Poisson arrivals of requests whose prompts begin with one of some shared prefixes, the popular ones often.

    Family k is drawn with weight 1 / k. The rest of a prompt is its own; its length and that of the output are
    log-uniform: many are short, few are long. Priorities are drawn evenly and apart from all else.
    """
    rng = random.Random(options.seed)
    prefixes = [random_ids(options.prefix_len, f"{options.seed}/family/{k}") for k in range(options.families)]
    weights = list(accumulate(1 / (k + 1) for k in range(options.families)))
    arrivals, now = [], 0.0
    for _ in range(options.num_prompts):
        now += rng.expovariate(options.rate) if options.rate else 0.0
        (prefix,) = rng.choices(prefixes, cum_weights=weights)
        own = random_ids(_log_uniform(rng, options.min_input_len, options.max_input_len), rng.getrandbits(63))
        params = replace(
            sampling,
            max_tokens=_log_uniform(rng, options.min_output_len, options.max_output_len),
            priority=rng.randrange(options.priorities),
        )
        arrivals.append(Arrival(now, [token_id % vocab_size for token_id in prefix + own], params))
    return arrivals


def poisson(prompts: Iterable[list[int]], params: Iterable[SamplingParams], rate: float, seed: int) -> list[Arrival]:
    """Given requests in their order, with Poisson arrivals: `rate` a second, all at once if that is 0."""
    rng = random.Random(seed)
    gaps = (rng.expovariate(rate) if rate else 0.0 for _ in iter(int, 1))
    arrivals, now = [], 0.0
    for prompt, param, gap in zip(prompts, params, gaps, strict=False):
        now += gap
        arrivals.append(Arrival(now, prompt, param))
    return arrivals


def serve(engine: Engine, arrivals: list[Arrival]) -> tuple[float, list[Served]]:
    """Hand each request over when its time has come; returns the seconds it took and what became of each, in order.

    A request counts as waiting from its arrival on, also while a step keeps it from being handed over.

    Raises:
        RequestError: a request that can't be served; all are checked first.
    """
    for arrival in arrivals:
        engine.check_request(arrival.prompt, arrival.params)
    served: dict[int, Served] = {}
    next_one = 0
    start = time.perf_counter()
    while len(served) < len(arrivals):
        now = time.perf_counter() - start
        while next_one < len(arrivals) and arrivals[next_one].time <= now:
            engine.add_request(str(next_one), arrivals[next_one].prompt, arrivals[next_one].params)
            next_one += 1
        if not engine.has_unfinished:
            time.sleep(arrivals[next_one].time - now)
        for output in engine.step() if engine.has_unfinished else ():
            index = int(output.request_id)
            served[index] = Served.of(output, arrivals[index].params.priority, start + arrivals[index].time)
    return time.perf_counter() - start, [served[index] for index in range(len(arrivals))]


def percentiles(served: Iterable[Served]) -> dict[str, float]:
    """`ttft_p50_ms` and so on: TTFT, TPOT and end-to-end time in milliseconds, for each of `PERCENTILES`."""
    served = list(served)
    found = {}
    for name in ("ttft", "tpot", "e2e"):
        values = [value for one in served if (value := getattr(one, name)) is not None]
        for percentile in PERCENTILES if values else ():
            found[f"{name}_p{percentile}_ms"] = 1000 * float(np.percentile(values, percentile))
    return found


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))
