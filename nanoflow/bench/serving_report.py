"""The report on requests that arrived over time: how long each waited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanoflow import __version__
from nanoflow.bench.report import Report, Table, rounded

PERCENTILES = (50, 90, 99)
COLUMNS = {
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99 ms",
    "urgent_ttft_p90_ms": "urgent TTFT p90",
    "tpot_p50_ms": "TPOT p50",
    "tpot_p99_ms": "TPOT p99 ms",
    "e2e_p50_ms": "E2E p50",
    "e2e_p99_ms": "E2E p99 ms",
    "preemptions": "preemptions",
    "hit_rate_percent": "cache hits %",
    "output_tokens_per_s": "output tok/s",
}


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


def report(description: dict[str, str], seconds: float, served: list[Served], hit_rate: float) -> Report:
    """The report on one engine.

    Args:
        description: of the engine.
        seconds: from the start to the last end, on the clock of `bench.step_ms`.
        served: what became of each request, in the order of arrival.
        hit_rate: tokens found in the prefix cache of those looked up, in percent.
    """
    levels = sorted({one.priority for one in served})
    by_priority = {level: [one for one in served if one.priority == level] for level in levels}
    numbers = _numbers(seconds, served, by_priority[levels[0]], hit_rate)
    groups = {"all": served}
    if len(levels) > 1:
        groups |= {f"priority {level}": some for level, some in by_priority.items()}
    rows = [row for name, some in groups.items() for row in _rows(name, some)]
    totals = (
        f"{numbers['requests']} requests, {numbers['prompt_tokens']} + {numbers['output_tokens']} tokens in "
        f"{seconds:.2f} s: output {numbers['output_tokens_per_s']:,} tok/s, "
        f"prefix-cache hits {hit_rate:.0f}%, preemptions {numbers['preemptions']}"
    )
    return Report(
        description=description,
        headline=f"TTFT p50 {numbers['ttft_p50_ms']:,} ms, p99 {numbers['ttft_p99_ms']:,} ms",
        columns=COLUMNS,
        numbers=numbers,
        record={
            "nanoflow": __version__,
            **description,
            **numbers,
            "by_priority": {str(level): percentiles(some) for level, some in by_priority.items()},
            "served": [asdict(one) for one in served],
        },
        shown=[Table(("requests", "time", *(f"p{p}" for p in PERCENTILES), "count"), rows), totals],
    )


def _numbers(seconds: float, served: list[Served], urgent: list[Served], hit_rate: float) -> dict[str, Any]:
    """Percentiles of all requests, and of the most urgent ones; totals."""
    output_tokens = sum(one.output_tokens for one in served)
    found = {
        **percentiles(served),
        **{f"urgent_{name}": value for name, value in percentiles(urgent).items()},
        "hit_rate_percent": hit_rate,
        "output_tokens_per_s": output_tokens / seconds,
        "seconds": seconds,
    }
    return {name: rounded(value) for name, value in found.items()} | {
        "requests": len(served),
        "prompt_tokens": sum(one.prompt_tokens for one in served),
        "output_tokens": output_tokens,
        "preemptions": sum(one.preemptions for one in served),
    }


def _rows(name: str, served: list[Served]) -> Iterator[tuple[object, ...]]:
    found = percentiles(served)
    for what in ("ttft", "tpot", "e2e"):
        values = (rounded(found.get(f"{what}_p{percentile}_ms")) for percentile in PERCENTILES)
        yield name, f"{what.upper()} ms", *values, len(served)


def percentiles(served: Iterable[Served]) -> dict[str, float]:
    """`ttft_p50_ms` and so on: TTFT, TPOT and end-to-end time in milliseconds, for each of `PERCENTILES`."""
    served = list(served)
    found = {}
    for name in ("ttft", "tpot", "e2e"):
        values = [value for one in served if (value := getattr(one, name)) is not None]
        for percentile in PERCENTILES if values else ():
            found[f"{name}_p{percentile}_ms"] = 1000 * float(np.percentile(values, percentile))
    return found
