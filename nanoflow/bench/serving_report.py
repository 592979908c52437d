"""How long requests waited that arrived over time: as numbers for sweeps, as JSON, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from nanoflow.bench.report import Report, Table, rounded

PERCENTILES = (50, 90, 99)


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


@dataclass(frozen=True)
class ServingReport(Report):
    """What became of the requests.

    Attributes:
        seconds: from the start to the last end, on the clock of `bench.step_ms`.
        served: each request, in the order of arrival.
        hit_rate: tokens found in the prefix cache of those looked up, in percent.
    """

    columns: ClassVar[dict[str, str]] = {
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

    seconds: float
    served: list[Served]
    hit_rate: float

    @property
    def headline(self) -> str:
        """The times to the first token."""
        numbers = self.numbers()
        return f"TTFT p50 {numbers['ttft_p50_ms']:,} ms, p99 {numbers['ttft_p99_ms']:,} ms"

    def numbers(self) -> dict[str, Any]:
        """Percentiles of all requests, and of the most urgent ones; totals."""
        output_tokens = sum(one.output_tokens for one in self.served)
        urgent = percentiles(next(iter(self._by_priority()))[1])
        found = {
            **percentiles(self.served),
            **{f"urgent_{name}": value for name, value in urgent.items()},
            "hit_rate_percent": self.hit_rate,
            "output_tokens_per_s": output_tokens / self.seconds,
            "seconds": self.seconds,
        }
        return {name: rounded(value) for name, value in found.items()} | {
            "requests": len(self.served),
            "prompt_tokens": sum(one.prompt_tokens for one in self.served),
            "output_tokens": output_tokens,
            "preemptions": sum(one.preemptions for one in self.served),
        }

    def details(self) -> dict[str, Any]:
        """The numbers, also by priority, and each request."""
        return {
            **self.numbers(),
            "by_priority": {str(level): percentiles(some) for level, some in self._by_priority()},
            "served": [asdict(one) for one in self.served],
        }

    def shown(self) -> Iterator[str | Table]:
        """The percentiles, by priority if there are several, and the totals."""
        groups = [("all", self.served), *((f"priority {level}", some) for level, some in self._by_priority())]
        rows = [row for name, some in (groups if len(groups) > 2 else groups[:1]) for row in _rows(name, some)]
        yield Table(("requests", "time", *(f"p{p}" for p in PERCENTILES), "count"), rows)
        numbers = self.numbers()
        yield (
            f"{numbers['requests']} requests, {numbers['prompt_tokens']} + {numbers['output_tokens']} tokens in "
            f"{self.seconds:.2f} s: output {numbers['output_tokens_per_s']:,} tok/s, "
            f"prefix-cache hits {self.hit_rate:.0f}%, preemptions {numbers['preemptions']}"
        )

    def _by_priority(self) -> Iterator[tuple[int, list[Served]]]:
        for level in sorted({one.priority for one in self.served}):
            yield level, [one for one in self.served if one.priority == level]


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
