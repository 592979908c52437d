"""The report on timed workloads: what each gave, beside what the device would allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

from nanoflow import __version__
from nanoflow.bench import profile
from nanoflow.bench.profile import Kernel
from nanoflow.bench.report import Report, Table, rounded
from nanoflow.bench.result import Result
from nanoflow.workloads.floor import Speed

TOP_KERNELS = 20
RESULTS = ("workload", "median", "min", "max", "unit", "repeats", "% of floor", "GPU idle %", "waiting %")
FLOORS = ("workload", "part", "GB", "TFLOP", "floor ms", "measured ms", "% of floor")
KERNELS = ("in the profile", "calls", "ms")


def report(
    description: dict[str, str], results: list[Result], speed: Speed | None, events: list[dict[str, Any]]
) -> Report:
    """The report on one engine.

    Args:
        description: of the engine.
        results: one a workload.
        speed: what the device does at best; None if that wasn't measured.
        events: of a profile; empty if there is none.
    """
    import torch

    kernels = profile.top_kernels(events, TOP_KERNELS)
    return Report(
        description=description,
        headline=", ".join(f"{result.name} {rounded(result.median):,} {result.unit}" for result in results),
        columns={key: title for result in results for key, title in _columns(result)},
        numbers={key: rounded(value) for key, value in _numbers(results, speed)},
        record={
            "nanoflow": __version__,
            "torch": torch.__version__,
            **description,
            "speed": asdict(speed) if speed else None,
            "results": [result.record() for result in results],
            "kernels": [asdict(kernel) for kernel in kernels],
        },
        shown=list(_shown(results, speed, kernels)),
    )


def _key(result: Result) -> str:
    return f"{result.name}_{result.unit.replace('/', '_per_')}"


def _columns(result: Result) -> Iterator[tuple[str, str]]:
    yield _key(result), f"{result.name} {result.unit}"
    yield f"{result.name}_floor_percent", "% of floor"


def _numbers(results: list[Result], speed: Speed | None) -> Iterator[tuple[str, float | None]]:
    for result in results:
        yield _key(result), result.median
        yield f"{_key(result)}_min", min(result.values)
        yield f"{_key(result)}_max", max(result.values)
        yield f"{result.name}_floor_percent", result.reached
    if speed:
        yield "bandwidth_gb_per_s", speed.bandwidth / 1e9


def _shown(results: list[Result], speed: Speed | None, kernels: list[Kernel]) -> Iterator[str | Table]:
    if speed:
        bandwidth, flops = speed.bandwidth / 1e9, speed.flops / 1e12
        yield f"The device reads {bandwidth:,.0f} GB/s and multiplies at {flops:,.3g} TFLOP/s."
    yield ""
    yield Table(RESULTS, [_row(result) for result in results])
    for result in results:
        if result.details:
            yield f"{result.name}: " + ", ".join(f"{key} {rounded(value):,}" for key, value in result.details.items())
    if any(result.floor for result in results):
        yield ""
        yield Table(FLOORS, [row for result in results for row in _floor_rows(result)])
    if kernels:
        yield ""
        yield Table(KERNELS, [(kernel.name, kernel.calls, rounded(1000 * kernel.seconds)) for kernel in kernels])


def _row(result: Result) -> tuple[object, ...]:
    values = map(rounded, (result.median, min(result.values), max(result.values)))
    idle = (100 * result.idle.share, 100 * result.idle.waiting) if result.idle else (None, None)
    return (result.name, *values, result.unit, len(result.values), rounded(result.reached), *map(rounded, idle))


def _floor_rows(result: Result) -> Iterator[tuple[object, ...]]:
    """The floor by part, and the total beside what it took."""
    if result.floor is None:
        return
    seconds = result.floor.parts
    for part, work in result.floor.work.items():
        if work.bytes or work.flops:
            amounts = (work.bytes / 1e9, work.flops / 1e12, 1000 * seconds[part])
            yield result.name, part, *map(rounded, amounts), None, None
    total = (1000 * result.floor.seconds, 1000 * median(result.seconds), result.reached)
    yield result.name, "total", None, None, *map(rounded, total)
