"""`nanoflow bench latency`: time of a decode step, to the first token, or from the start of a process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from nanoflow.bench import workloads
from nanoflow.bench.rounds import Rounds
from nanoflow.cli.bench import job
from nanoflow.cli.bench.report import BenchReport
from nanoflow.cli.bench.settings import LatencyConfig
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow bench latency [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Measures the time of a decode step, of the first token of a prompt, or from the start of a process to its first token.

  nanoflow bench latency checkpoint=qwen3-0.6b engine.load_format=dummy bench.batch_sizes=[1,8,64]
  nanoflow bench latency bench.workload=start
  nanoflow bench latency -m attention=triton,flash 'bench.batch_sizes=[1]'     a job for each, and a table of them all
"""


def _measure(config: LatencyConfig, registry: Registry, rounds: Rounds, profile: Path | None) -> BenchReport:
    options = config.bench
    if options.workload == "start":
        from nanoflow.bench import start

        result, made_of = start.result(config.build, rounds)
        return BenchReport(made_of, [result])
    from nanoflow.bench.subject import Subject  # takes seconds: what can be checked without it has been by now

    with Subject(config.build, registry) as subject:
        equal = partial(workloads.equal, sampling=config.sampling, vocab_size=subject.vocab_size, seed=options.seed)
        if options.workload == "decode":
            lengths = {"input_len": options.input_len, "output_len": options.output_len}
            requests = [equal(f"decode-{size}", count=size, **lengths) for size in options.batch_sizes]
            results = [replace(subject.decode(w, rounds), idle=subject.idle(w, rounds)) for w in requests]
            record = subject.decode_trace
        else:
            requests = [equal("ttft-128", count=1, input_len=128, output_len=1)]
            results = [subject.ttft(workload, rounds) for workload in requests]
            record = subject.prefill_trace
        events = record(requests[-1], rounds, options.profile_steps, profile) if profile else []
        return BenchReport.of(subject, results, events)


COMMAND = job.command("latency", LatencyConfig, INTRO, _measure)
main = COMMAND.main
