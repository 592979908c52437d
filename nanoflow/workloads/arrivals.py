"""Requests that arrive over time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.workloads.offline import random_ids
from nanoflow.workloads.options import ServingOptions


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


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))
