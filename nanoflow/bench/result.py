"""What a measurement gave, beside what the device would allow."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from nanoflow.bench.profile import Idle
from nanoflow.workloads.floor import Speed, Work


@dataclass(frozen=True)
class Floor:
    """The least time for what was measured, at the speed that the device showed in the same run.

    Attributes:
        work: by part: attention, linear, head, prefill.
        speed: the device's.
    """

    work: dict[str, Work]
    speed: Speed

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        return {part: work.seconds(self.speed) for part, work in self.work.items()}

    @property
    def seconds(self) -> float:
        """The parts one after the other."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Result:
    """One workload's outcome.

    Attributes:
        name: such as `offline256` or `decode-8`.
        unit: of `values`: `tok/s`, `ms` or `s`.
        seconds: of each repeat: all requests, one step, or up to the first token.
        tokens: output tokens of each repeat, for a rate; 0 for a latency.
        floor: None where it isn't known.
        idle: of decode steps; None without a GPU.
        details: counts and times beside the main one.
    """

    name: str
    unit: str
    seconds: list[float]
    tokens: list[int] = field(default_factory=list)
    floor: Floor | None = None
    idle: Idle | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """One a repeat, in `unit`."""
        if self.unit == "tok/s":
            return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        return [seconds * (1000 if self.unit == "ms" else 1) for seconds in self.seconds]

    @property
    def median(self) -> float:
        """The middle one of `values`."""
        return statistics.median(self.values)

    @property
    def reached(self) -> float | None:
        """The floor's share of the time that it took, in percent: 100 is the best there can be."""
        return 100 * self.floor.seconds / statistics.median(self.seconds) if self.floor else None

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        record: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": self.values,
            "seconds": self.seconds,
            **self.details,
        }
        if self.floor:
            seconds = self.floor.parts
            parts = {part: {**asdict(work), "seconds": seconds[part]} for part, work in self.floor.work.items()}
            record["floor"] = {"seconds": self.floor.seconds, "reached_percent": self.reached, "parts": parts}
        if self.idle:
            record["idle"] = asdict(self.idle)
        return record
