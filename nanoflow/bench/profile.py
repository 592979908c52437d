"""What the device does over some steps, by torch.profiler: a Chrome trace, its top kernels, its idle time."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in a Chrome trace
STARTING = 4  # steps before those that are kept, while the profiler starts
PAUSE = 10.0  # microseconds; a longer gap is a wait for the host, a shorter one lies between two kernels


@dataclass(frozen=True)
class Idle:
    """The GPU's time without work, as a share of all, from the first kernel's start to the last one's end.

    Attributes:
        share: in all gaps.
        waiting: in gaps of more than 10 microseconds, where the host was late.
    """

    share: float
    waiting: float


@dataclass(frozen=True)
class Kernel:
    """All calls of a kernel, or of an operator on a CPU.

    Attributes:
        name: without its parameters.
        calls: how many.
        seconds: of all calls, without those inside them.
    """

    name: str
    calls: int
    seconds: float


def record(step: Callable[[], object], num_steps: int, path: Path | None = None, *, cuda: bool) -> list[dict[str, Any]]:
    """The events of `num_steps` calls of `step`, in Chrome's trace format, times in microseconds.

    Args:
        step: called some times more before those that count.
        path: also write the trace there, host side included; zipped if it ends in .gz.
        cuda: record the GPU.
    """
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CUDA] if cuda else []
    if path is not None or not cuda:
        activities.append(ProfilerActivity.CPU)
    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder) / "trace.json"
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=STARTING, active=num_steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
        ) as profiler:
            for _ in range(STARTING + num_steps):
                step()
                profiler.step()
        content = file.read_bytes()
    return json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)["traceEvents"]


def idle(events: list[dict[str, Any]]) -> Idle | None:
    """The GPU's idle share; None if no GPU was recorded."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in DEVICE_WORK)
    if not spans:
        return None
    begin = until = spans[0][0]
    gaps = []
    for start, end in spans:
        gaps.append(max(0.0, start - until))
        until = max(until, end)
    whole = max(until - begin, 1e-9)
    return Idle(share=sum(gaps) / whole, waiting=sum(gap for gap in gaps if gap > PAUSE) / whole)


def top_kernels(events: list[dict[str, Any]], count: int) -> list[Kernel]:
    """The kernels, or on a CPU the operators, that took most time."""
    found = [event for event in events if event.get("cat") in DEVICE_WORK]
    times = [event["dur"] for event in found]
    if not found:
        found = [event for event in events if event.get("cat") == "cpu_op"]
        times = _own_times(found)
    calls: dict[str, list[float]] = defaultdict(list)
    for event, own in zip(found, times, strict=True):
        calls[_short(event["name"])].append(own)
    kernels = [Kernel(name, len(own), sum(own) / 1e6) for name, own in calls.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)[:count]


def _own_times(events: list[dict[str, Any]]) -> list[float]:
    """The duration of each event without that of the events inside it."""
    own = [event["dur"] for event in events]
    order = sorted(range(len(events)), key=lambda i: (events[i]["tid"], events[i]["ts"], -events[i]["dur"]))
    around: list[int] = []
    for index in order:
        event = events[index]
        while around and not _inside(event, events[around[-1]]):
            around.pop()
        if around:
            own[around[-1]] -= event["dur"]
        around.append(index)
    return own


def _inside(event: dict[str, Any], other: dict[str, Any]) -> bool:
    return event["tid"] == other["tid"] and event["ts"] < other["ts"] + other["dur"]


def _short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = name.removeprefix("void ").partition("(")[0] if not name.startswith("(") else name
    return name if len(name) <= 72 else name.partition("<")[0][:72]
