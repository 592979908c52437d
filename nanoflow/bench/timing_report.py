"""What timed workloads gave, beside what the device would allow: as numbers for sweeps, as JSON, and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from nanoflow.bench import profile
from nanoflow.bench.profile import Kernel
from nanoflow.bench.report import Report, Table, rounded
from nanoflow.bench.result import Result
from nanoflow.workloads.floor import Speed

if TYPE_CHECKING:
    from nanoflow.bench.measured_engine import MeasuredEngine

TOP_KERNELS = 20


@dataclass(frozen=True)
class TimingReport(Report):
    """The results of one engine.

    Attributes:
        results: one a workload.
        speed: what the device does at best; None if that wasn't measured.
        kernels: those that took most time in the profile; empty if there is none.
    """

    results: list[Result]
    speed: Speed | None = None
    kernels: list[Kernel] = field(default_factory=list)

    @classmethod
    def of(cls, engine: MeasuredEngine, results: list[Result], events: list[dict[str, Any]]) -> TimingReport:
        """The report on an engine, with the events of a profile, if there is one."""
        return cls(engine.description, results, engine.speed, profile.top_kernels(events, TOP_KERNELS))

    @property
    def columns(self) -> dict[str, str]:  # type: ignore[override]
        """The median of each result, and how much of the floor it reached."""
        titles: dict[str, str] = {}
        for result in self.results:
            titles[_key(result)] = f"{result.name} {result.unit}"
            titles[f"{result.name}_floor_percent"] = "% of floor"
        return titles

    @property
    def headline(self) -> str:
        """The medians."""
        return ", ".join(f"{result.name} {rounded(result.median):,} {result.unit}" for result in self.results)

    def numbers(self) -> dict[str, Any]:
        """Median, least and most of each result; the bandwidth."""
        found: dict[str, Any] = {}
        for result in self.results:
            found[_key(result)] = rounded(result.median)
            found[f"{_key(result)}_min"] = rounded(min(result.values))
            found[f"{_key(result)}_max"] = rounded(max(result.values))
            found[f"{result.name}_floor_percent"] = rounded(result.reached)
        if self.speed:
            found["bandwidth_gb_per_s"] = rounded(self.speed.bandwidth / 1e9)
        return found

    def details(self) -> dict[str, Any]:
        """Each result, the device's speed and the kernels."""
        import torch

        return {
            "torch": torch.__version__,
            "speed": asdict(self.speed) if self.speed else None,
            "results": [result.record() for result in self.results],
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }

    def shown(self) -> Iterator[str | Table]:
        """Results, floors and kernels."""
        if self.speed:
            bandwidth, flops = self.speed.bandwidth / 1e9, self.speed.flops / 1e12
            yield f"The device reads {bandwidth:,.0f} GB/s and multiplies at {flops:,.3g} TFLOP/s.\n"
        else:
            yield ""
        yield _results(self.results)
        for result in self.results:
            if result.details:
                figures = ", ".join(f"{key} {rounded(value):,}" for key, value in result.details.items())
                yield f"{result.name}: {figures}"
        if any(result.floor for result in self.results):
            yield ""
            yield _floors(self.results)
        if self.kernels:
            rows = [(kernel.name, kernel.calls, rounded(1000 * kernel.seconds)) for kernel in self.kernels]
            yield ""
            yield Table(("in the profile", "calls", "ms"), rows)


def _results(results: list[Result]) -> Table:
    """A row a result."""
    head = ("workload", "median", "min", "max", "unit", "repeats", "% of floor", "GPU idle %", "waiting %")
    return Table(head, [_row(result) for result in results])


def _row(result: Result) -> tuple[object, ...]:
    values = map(rounded, (result.median, min(result.values), max(result.values)))
    idle = (100 * result.idle.share, 100 * result.idle.waiting) if result.idle else (None, None)
    return (result.name, *values, result.unit, len(result.values), rounded(result.reached), *map(rounded, idle))


def _floors(results: list[Result]) -> Table:
    """The floor of each result by part, beside what it took."""
    head = ("workload", "part", "GB", "TFLOP", "floor ms", "measured ms", "% of floor")
    return Table(head, [row for result in results for row in _floor_rows(result)])


def _floor_rows(result: Result) -> Iterator[tuple[object, ...]]:
    if result.floor is None:
        return
    seconds = result.floor.parts
    for part, work in result.floor.work.items():
        if work.bytes or work.flops:
            amounts = (work.bytes / 1e9, work.flops / 1e12, 1000 * seconds[part])
            yield result.name, part, *map(rounded, amounts), None, None
    total = (1000 * result.floor.seconds, 1000 * median(result.seconds), result.reached)
    yield result.name, "total", None, None, *map(rounded, total)


def _key(result: Result) -> str:
    return f"{result.name}_{result.unit.replace('/', '_per_')}"
