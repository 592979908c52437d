"""All targets in one run on one GPU, random weights at real dimensions, in about five minutes.

    python benchmarks/targets.py --out results
    python benchmarks/targets.py --models qwen3-0.6b --parts decode ttft --repeats 5 attention=triton block_size=256

Writes `targets.json` and `targets.md` after every part, so that a run cut short keeps what it has. A part that fails is
told and doesn't stop the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from nanoflow import SamplingParams, __version__
from nanoflow.bench import start
from nanoflow.bench.measured_engine import MeasuredEngine
from nanoflow.bench.report import rounded
from nanoflow.bench.result import Result
from nanoflow.bench.rounds import Rounds
from nanoflow.core.api.options import config_from_options
from nanoflow.core.config.engine_config import Config
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads import offline
from nanoflow.workloads.floor import Speed

TARGETS = {  # in the unit of the result; idle in percent
    "qwen3-0.6b": {
        "start": 10.0, "offline256": 22_000, "idle": 3.0, "decode-1": 0.70, "decode-8": 0.85, "decode-64": 2.0,
        "ttft-128": 3.0,
    },
    "qwen3-8b": {"offline256": 8_800, "decode-1": 5.7},
}  # fmt: skip
WORKLOADS = {
    "qwen3-0.6b": ("start", "offline256", "decode-1", "decode-8", "decode-64", "ttft-128"),
    "qwen3-8b": ("decode-1", "offline256", "decode-64"),
}
PARTS = ("start", "offline256", "decode", "ttft")
SAMPLING = SamplingParams(temperature=0.6, ignore_eos=True)


@dataclass
class Findings:
    """What was measured so far, kept in files.

    Attributes:
        folder: where.
        speeds: what the device did at best, by model.
        descriptions: of each model's engine.
        results: by model.
        failures: model, part and reason.
    """

    folder: Path
    speeds: dict[str, Speed] = field(default_factory=dict)
    descriptions: dict[str, dict[str, str]] = field(default_factory=dict)
    results: list[tuple[str, Result]] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, model: str, part: str, measure: Callable[[], Result]) -> None:
        """Measure, note the result or why there is none, and write it down."""
        try:
            result = measure()
            self.results.append((model, result))
            print(f"{model} {result.name}: {rounded(result.median):,} {result.unit}", flush=True)
        except Exception as error:
            self.fail(model, part, error)
        self.write()

    def fail(self, model: str, part: str, error: Exception) -> None:
        """Note why a part has no result."""
        traceback.print_exception(error)
        self.failures.append((model, part, f"{type(error).__name__}: {error}"))

    def write(self) -> None:
        """Bring the files up to date."""
        record = {
            "nanoflow": __version__,
            "torch": torch.__version__,
            "made_of": self.descriptions,
            "speeds": {model: asdict(speed) for model, speed in self.speeds.items()},
            "results": [{"model": model, **result.record()} for model, result in self.results],
            "failures": self.failures,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "targets.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (self.folder / "targets.md").write_text(self.table() + "\n", encoding="utf-8")

    def table(self) -> str:
        """The results in Markdown."""
        head = ("model", "workload", "target", "measured", "least to most", "of the floor", "floor")
        rows = [head, ("---",) * len(head)]
        for model, result in self.results:
            rows += _rows(model, result)
        rows += [(model, part, "", f"failed: {reason}", "", "", "") for model, part, reason in self.failures]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        for model, speed in self.speeds.items():
            bandwidth, flops = speed.bandwidth / 1e9, speed.flops / 1e12
            done = f"In this run the device read {bandwidth:,.0f} GB/s and multiplied at {flops:,.3g} TFLOP/s."
            lines += ["", f"{', '.join(self.descriptions[model].values())}. {done}"]
        return "\n".join(lines)


def _rows(model: str, result: Result) -> Iterator[tuple[str, ...]]:
    targets, unit = TARGETS.get(model, {}), result.unit
    target = f"{targets[result.name]:,} {unit}" if result.name in targets else ""
    spread = f"{rounded(min(result.values)):,} to {rounded(max(result.values)):,}"
    floor = ("", "")
    if result.floor:
        parts = ", ".join(f"{part} {_time(seconds)}" for part, seconds in result.floor.parts.items() if seconds)
        floor = f"{result.reached:.0f} %", f"{_time(result.floor.seconds)} ({parts})"
    yield model, result.name, target, f"{rounded(result.median):,} {unit}", spread, *floor
    if result.idle:
        target = f"under {targets['idle']} %" if "idle" in targets and result.name == "offline256" else ""
        waiting = f"{100 * result.idle.waiting:.1f} % waiting for the host"
        yield model, f"GPU idle in {result.name}", target, f"{100 * result.idle.share:.1f} %", waiting, "", ""


def _time(seconds: float) -> str:
    return f"{rounded(seconds)} s" if seconds >= 1 else f"{rounded(1000 * seconds)} ms"


def measure(engine: MeasuredEngine, name: str, targets: dict[str, float], rounds: Rounds) -> Result:
    """The workload of that name; the GPU's idle share too, if there is a target for that."""
    workload = offline.named(name, SAMPLING, engine.vocab_size)
    result = engine.measure(workload, rounds)
    if name != "offline256" or "idle" not in targets:
        return result
    try:
        return replace(result, idle=engine.idle(workload, rounds))
    except Exception:  # a profiler that doesn't work here must not cost the figure
        traceback.print_exc()
        return result


def measure_model(findings: Findings, model: str, config: Config, names: list[str], rounds: Rounds) -> None:
    """All workloads of a model: start in a process of its own, the others on one engine."""
    if "start" in names:  # while the GPU's memory is free
        findings.add(model, "start", lambda: start.result(config, rounds)[0])
        names = [name for name in names if name != "start"]
    if not names:
        return
    try:
        engine = MeasuredEngine(config, Registry.load())
    except Exception as error:
        for name in names:
            findings.fail(model, name, error)
        findings.write()
        return
    with engine:
        findings.speeds[model], findings.descriptions[model] = engine.speed, engine.description
        for name in names:
            findings.add(model, name, partial(measure, engine, name, TARGETS.get(model, {}), rounds))
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WORKLOADS), help="bundled names, folders or Hub ids")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for targets.json and targets.md")
    parser.add_argument("overrides", nargs="*", help="options of LLM(...) as KEY=VALUE, such as attention=triton")
    arguments = parser.parse_intermixed_args()
    pairs = [override.partition("=")[::2] for override in arguments.overrides]
    options: dict[str, Any] = {key.rpartition(".")[2]: yaml.safe_load(value) for key, value in pairs}
    rounds = Rounds(arguments.warmup, arguments.repeats)
    findings = Findings(arguments.out)
    for model in arguments.models:
        config = config_from_options(Registry.load(), model, {"load_format": "dummy", "freeze_gc": True} | options)
        names = WORKLOADS.get(model, WORKLOADS["qwen3-0.6b"])
        wanted = [name for name in names if name.startswith(tuple(arguments.parts))]
        measure_model(findings, model, config, wanted, rounds)
    print(f"\n{findings.table()}\n\nKept in {arguments.out}")


if __name__ == "__main__":
    main()
