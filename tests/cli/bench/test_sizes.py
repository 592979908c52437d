"""Sizes of workloads on a CPU, and the progress of a measurement."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nanoflow.bench import job as bench_job
from nanoflow.bench import latency, serving, throughput
from nanoflow.bench.progress import Progress
from nanoflow.bench.report import Report
from nanoflow.bench.rounds import Rounds
from nanoflow.cli.bench.sizes import ON_A_CPU, on_a_cpu
from nanoflow.workloads.options import LatencyOptions, ServingOptions, ThroughputOptions
from tests.cli.conftest import Cli

DEFAULTS = {
    "throughput": ThroughputOptions(), "latency": LatencyOptions(), "serving": ServingOptions(),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_bench_on_a_cpu_is_small_by_default_and_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    measured: list[bench_job.BenchJob] = []

    def measure(job: bench_job.BenchJob, registry: object) -> Report:
        measured.append(job)
        return Report({"checkpoint": "bard", "device": "cpu", "dtype": "float32"}, "", {}, {}, shown=[])

    for module in (throughput, latency, serving):
        monkeypatch.setattr(module, "measure", measure)
    default = DEFAULTS[kind]
    sizes = ON_A_CPU[default.workload]
    out = cli("bench", kind).out
    assert measured[-1].options == replace(default, **sizes)
    name, value = next(iter(sizes.items()))
    assert f"On a CPU the workload is a small one by default: bench.{name}={value}" in out
    full = f"bench.{name}={getattr(default, name)}"
    assert "On a CPU" not in cli("bench", kind, full).out  # asked for, though it is the default
    assert measured[-1].options == default
    assert "On a CPU" not in cli("bench", kind, f"bench.{name}=7").out
    assert getattr(measured[-1].options, name) == 7


def test_virtual_time_is_the_same_on_any_machine() -> None:
    assert on_a_cpu(ServingOptions(step_ms=2.0), set()) == (ServingOptions(step_ms=2.0), None)
    assert on_a_cpu(LatencyOptions(workload="start"), set()) == (LatencyOptions(workload="start"), None)


def test_long_measurements_tell_how_long_they_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, *(7.0 * number for number in range(1, 10))])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert Rounds(warmup=1, repeats=3).run("decode-8", lambda number: number) == [1, 2, 3]
    assert capsys.readouterr().err == "decode-8: 2 of 4 rounds, about 14 s left\n"


def test_short_ones_are_quiet_and_terminals_get_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Rounds(warmup=0, repeats=2).run("short", str)
    assert capsys.readouterr().err == ""
    with Progress("serving", 3, "request", bar=True) as progress:
        progress.add()
    assert "/3 [" in capsys.readouterr().err
