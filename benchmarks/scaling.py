"""One model on 1, 2, ... GPUs: decode steps and offline throughput with scaling efficiency, as a table in Markdown.

    python benchmarks/scaling.py --model qwen3-8b --sizes 1 2 --one-shot 0 8192 --out results
    python benchmarks/scaling.py --model qwen3-8b --sizes 1 --alone 2 4  # on one GPU

The second measures one rank of 2, and one of 4, without the others: what is left to be gained if sums cost nothing.

Random weights at real dimensions. Every engine is measured in a process of its own, which is ended after `--timeout`
seconds, once all its ranks have written where they are. `scaling.json` and `scaling.md` are written after each, so that
a run cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

LAST_WORDS = 15  # seconds between the ranks' stacks and the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", help="a bundled name, a folder or a Hub id")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--one-shot", nargs="+", type=int, default=[0, 8192], help="values of engine.one_shot_kib")
    parser.add_argument("--alone", nargs="+", type=int, default=[], help="one rank of so many, on one GPU by itself")
    parser.add_argument("--workloads", nargs="+", default=["decode-1", "decode-64", "offline256"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one engine and all its workloads")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for scaling.json and scaling.md")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the options of one engine, as JSON
    parser.add_argument("overrides", nargs="*", help="options of LLM(...) as KEY=VALUE, such as attention=triton")
    arguments = parser.parse_intermixed_args()
    if arguments.measure:
        measure(arguments, json.loads(arguments.measure))
        return
    pairs = [override.partition("=")[::2] for override in arguments.overrides]
    options = {key.rpartition(".")[2]: yaml.safe_load(value) for key, value in pairs}
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for size, alone in [(size, False) for size in arguments.sizes] + [(size, True) for size in arguments.alone]:
        for one_shot in arguments.one_shot if size > 1 else [0]:
            row = {"gpus": size, "one_shot_kib": one_shot, "alone": alone}
            engine = {"one_shot_kib": one_shot, "load_format": "dummy", "freeze_gc": True} | options
            rows.append(row | in_a_process(arguments, engine, size, alone))
            text = table(rows, arguments.workloads)
            (arguments.out / "scaling.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            (arguments.out / "scaling.md").write_text(text + "\n", encoding="utf-8")
            print(text, flush=True)


def in_a_process(arguments: argparse.Namespace, engine: dict[str, Any], size: int, alone: bool) -> dict[str, Any]:
    """What `measure` found; its standard error goes to ours."""
    names = ("model", "repeats", "warmup", "timeout")
    command = [sys.executable, __file__, *(f"--{name}={getattr(arguments, name)}" for name in names)]
    command += ["--alone", str(size)] if alone else []
    engine = engine | {"tensor_parallel_size": 1 if alone else size}
    command += ["--measure", json.dumps(engine), "--workloads", *arguments.workloads]
    environment = {"NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1"} | os.environ
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        killer = threading.Timer(arguments.timeout + LAST_WORDS, process.kill)
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                found |= json.loads(line)
        code = process.wait()
        killer.cancel()
    return found if code == 0 else found | {"failure": f"exit code {code}"}


def measure(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Build one engine and run the workloads on it, each result a line of JSON."""
    from one_of_many import one_of

    from nanoflow import SamplingParams
    from nanoflow.bench.measured_engine import MeasuredEngine
    from nanoflow.bench.rounds import Rounds
    from nanoflow.core.api.options import config_from_options
    from nanoflow.core.registry.registry import Registry
    from nanoflow.workloads import offline

    faulthandler.dump_traceback_later(arguments.timeout)
    for_others = threading.Timer(arguments.timeout, abort_children)
    for_others.daemon = True
    for_others.start()
    began = time.monotonic()
    registry = Registry.load()
    with ExitStack() as stack:
        if arguments.alone:
            stack.enter_context(one_of(*arguments.alone))
        config = config_from_options(registry, arguments.model, options)
        engine = stack.enter_context(MeasuredEngine(config, registry))
        found = {"start_s": round(time.monotonic() - began, 1), "made_of": engine.description}
        print(json.dumps(found), flush=True)
        for name in arguments.workloads:
            workload = offline.named(name, SamplingParams(temperature=0.6, ignore_eos=True), engine.vocab_size)
            result = engine.measure(workload, Rounds(arguments.warmup, arguments.repeats))
            print(json.dumps({name: result.median}), flush=True)
    faulthandler.cancel_dump_traceback_later()


def abort_children() -> None:
    """Make the other ranks write their stacks, and so end the engine."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            is_child = int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
        except OSError:
            continue
        if is_child:
            os.kill(int(stat.parent.name), signal.SIGABRT)


def table(rows: list[dict[str, Any]], workloads: list[str]) -> str:
    """The rows, each figure with how many times as fast as the first row it is, and what share that is of its GPUs."""
    head = ["GPUs", "sums", "start", *workloads]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        by_default = "" if row["gpus"] == 1 else "none" if row["alone"] else "NCCL"
        sums = f"in norms to {row['one_shot_kib']} KiB" if row["one_shot_kib"] else by_default
        figures = [figure(rows[0], row, name) for name in workloads]
        gpus = f"1 of {row['gpus']}" if row["alone"] else str(row["gpus"])
        lines.append([gpus, sums, f"{row['start_s']} s" if "start_s" in row else "", *figures])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    failures = [f"{row['gpus']} GPUs, one_shot_kib={row['one_shot_kib']}: {row['failure']}." for row in rows
                if "failure" in row]  # fmt: skip
    description = next((", ".join(row["made_of"].values()) for row in rows if "made_of" in row), "")
    return "\n\n".join([text, description, *failures])


def figure(first: dict[str, Any], row: dict[str, Any], name: str) -> str:
    """A cell: `3.1 ms (1.8 x, 90 %)`."""
    if name not in row:
        return "failed" if "failure" in row else ""
    is_rate = name.startswith("offline")
    text = f"{row[name]:,.0f} tok/s" if is_rate else f"{row[name]:.2f} ms"
    if row is first or name not in first:
        return text
    gain = row[name] / first[name] if is_rate else first[name] / row[name]
    return f"{text} ({gain:.2f} x, {100 * gain * first['gpus'] / row['gpus']:.0f} %)"


if __name__ == "__main__":
    main()
