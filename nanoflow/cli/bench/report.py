"""What a job of `bench` found out: as numbers for sweeps, as JSON, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from nanoflow import __version__
from nanoflow.bench import trace
from nanoflow.bench.floor import Speed
from nanoflow.bench.results import Result
from nanoflow.bench.trace import Kernel
from nanoflow.cli import show

if TYPE_CHECKING:
    from nanoflow.bench.subject import Subject

TOP_KERNELS = 20


@dataclass(frozen=True)
class BenchReport:
    """The results of a job.

    Attributes:
        made_of: checkpoint, the plugin of each role, device and dtype.
        results: one a workload.
        speed: what the device does at best; None if that wasn't measured.
        kernels: those that took most time in the profile; empty if there is none.
    """

    made_of: dict[str, str]
    results: list[Result]
    speed: Speed | None = None
    kernels: list[Kernel] = field(default_factory=list)

    @classmethod
    def of(cls, subject: Subject, results: list[Result], events: list[dict[str, Any]]) -> BenchReport:
        """The report on an engine, with the events of a profile, if there is one."""
        return cls(subject.llm.describe(), results, subject.speed, trace.top_kernels(events, TOP_KERNELS))

    @property
    def columns(self) -> dict[str, str]:
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
        """What can be compared between jobs."""
        found: dict[str, Any] = {}
        for result in self.results:
            found[_key(result)] = rounded(result.median)
            found[f"{_key(result)}_min"] = rounded(min(result.values))
            found[f"{_key(result)}_max"] = rounded(max(result.values))
            found[f"{result.name}_floor_percent"] = rounded(result.reached)
        if self.speed:
            found["bandwidth_gb_per_s"] = rounded(self.speed.bandwidth / 1e9)
        return found

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        import torch

        return {
            "nanoflow": __version__,
            "torch": torch.__version__,
            **self.made_of,
            "speed": asdict(self.speed) if self.speed else None,
            "results": [result.record() for result in self.results],
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }


def show_all(report: BenchReport) -> None:
    """Print the tables."""
    show.engine(report.made_of)
    if report.speed:
        bandwidth, flops = report.speed.bandwidth / 1e9, report.speed.flops / 1e12
        print(f"The device reads {bandwidth:,.0f} GB/s and multiplies at {flops:,.3g} TFLOP/s.")
    print(f"\n{results_table(report.results)}")
    for result in report.results:
        if result.details:
            print(f"{result.name}: " + ", ".join(f"{key} {rounded(value):,}" for key, value in result.details.items()))
    if any(result.floor for result in report.results):
        print(f"\n{floor_table(report.results)}")
    if report.kernels:
        rows = [(kernel.name, kernel.calls, rounded(1000 * kernel.seconds)) for kernel in report.kernels]
        print(f"\n{show.table(('in the profile', 'calls', 'ms'), rows)}")


def results_table(results: Iterable[Result]) -> str:
    """A line a result."""
    head = ("workload", "median", "min", "max", "unit", "repeats", "% of floor", "GPU idle %", "waiting %")
    return show.table(head, map(_row, results))


def _row(result: Result) -> tuple[object, ...]:
    values = map(rounded, (result.median, min(result.values), max(result.values)))
    idle = (100 * result.idle.share, 100 * result.idle.waiting) if result.idle else (None, None)
    return (result.name, *values, result.unit, len(result.values), rounded(result.reached), *map(rounded, idle))


def floor_table(results: Iterable[Result]) -> str:
    """The floor of each result by part, beside what it took."""
    head = ("workload", "part", "GB", "TFLOP", "floor ms", "measured ms", "% of floor")
    return show.table(head, (row for result in results for row in _floor_rows(result)))


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


def rounded(value: float | None) -> float | None:
    """Three digits, or all those before the point."""
    if value is None or isinstance(value, int):
        return value
    return round(value) if abs(value) >= 100 else float(f"{value:.3g}")


def _key(result: Result) -> str:
    return f"{result.name}_{result.unit.replace('/', '_per_')}"
