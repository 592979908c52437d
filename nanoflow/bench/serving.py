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
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.engine.engine import Engine

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


class Clock:
    """Seconds since the start: those that pass, or virtual ones.

    Args:
        step: virtual seconds that a step takes; None for real time.
    """

    def __init__(self, step: float | None = None) -> None:
        self.step = step
        self.start = 0.0 if step else time.perf_counter()
        self.virtual = 0.0

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.virtual if self.step else time.perf_counter() - self.start

    def wait_until(self, moment: float) -> None:
        """Let time pass; nothing happens until then."""
        if self.step:
            self.virtual = max(self.virtual, moment)
        else:
            time.sleep(max(0.0, moment - self.now))

    def tick(self) -> None:
        """A step was done."""
        self.virtual += self.step or 0.0


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


def serve(engine: Engine, arrivals: list[Arrival], clock: Clock) -> list[Served]:
    """Hand each request over when its time has come; returns what became of each, in order.

    A request counts as waiting from its arrival on, also while a step keeps it from being handed over. A token is there
    when the step has brought it to the host.

    Raises:
        RequestError: a request that can't be served; all are checked first.
    """
    for arrival in arrivals:
        engine.check_request(arrival.prompt, arrival.params)
    first_tokens: dict[int, float] = {}
    served: dict[int, Served] = {}
    next_one = 0
    while len(served) < len(arrivals):
        while next_one < len(arrivals) and arrivals[next_one].time <= clock.now:
            arrival = arrivals[next_one]
            engine.add_request(str(next_one), arrival.prompt, arrival.params, output_kind=RequestOutputKind.CUMULATIVE)
            next_one += 1
        if not engine.has_unfinished:
            clock.wait_until(arrivals[next_one].time)
            continue
        outputs = engine.step()
        clock.tick()
        now = clock.now
        for output in outputs:
            index = int(output.request_id)
            first = first_tokens.setdefault(index, now)
            if output.finished:
                served[index] = _served(output, arrivals[index], first, now)
    return [served[index] for index in range(len(arrivals))]


def _served(output: RequestOutput, arrival: Arrival, first_token: float, end: float) -> Served:
    num_tokens = len(output["token_ids"])
    return Served(
        priority=arrival.params.priority,
        prompt_tokens=len(output.prompt_token_ids),
        output_tokens=num_tokens,
        cached_tokens=output.num_cached_tokens,
        preemptions=output.metrics.num_preemptions,
        ttft=first_token - arrival.time,
        tpot=(end - first_token) / (num_tokens - 1) if num_tokens > 1 else None,
        e2e=end - arrival.time,
    )


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
