"""`nanoflow bench throughput`: output tokens a second of many requests at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nanoflow.bench import workloads
from nanoflow.bench.rounds import Rounds
from nanoflow.bench.workloads import Workload
from nanoflow.cli import prompts
from nanoflow.cli.bench import job
from nanoflow.cli.bench.report import BenchReport
from nanoflow.cli.bench.settings import ThroughputConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.registry import Registry

INTRO = """\
Usage: nanoflow bench throughput [flags] [GROUP=OPTION ...] [KEY=VALUE ...]

Measures the output tokens a second of many requests at once.

  nanoflow bench throughput checkpoint=qwen3-8b engine.load_format=dummy bench.output=8b.json
  nanoflow bench throughput bench.num_prompts=16 bench.max_input_len=200 bench.max_output_len=200
  nanoflow bench throughput -m scheduler.max_num_seqs=64,256    a job for each value, and a table of them all
"""


def _measure(config: ThroughputConfig, registry: Registry, rounds: Rounds, profile: Path | None) -> BenchReport:
    requests = _requests(config)
    from nanoflow.bench.subject import Subject  # takes seconds: what can be checked without it has been by now

    with Subject(config.build, registry) as subject:
        if requests is None:
            build = workloads.offline256 if config.bench.workload == "offline256" else workloads.uniform
            workload = build(config.bench, config.sampling, subject.vocab_size)
        else:
            texts, params = requests
            workload = Workload("file", subject.encode(texts), params, subject.vocab_size, modulus=subject.vocab_size)
        result = replace(subject.throughput(workload, rounds), idle=subject.idle(workload, rounds))
        events = subject.decode_trace(workload, rounds, config.bench.profile_steps, profile) if profile else []
        return BenchReport.of(subject, [result], events)


def _requests(config: ThroughputConfig) -> tuple[list, list] | None:
    """The prompts of `bench.workload=file`, with their sampling parameters; None for other workloads."""
    if (config.bench.workload == "file") != (config.prompts_file is not None):
        raise ConfigError("bench.workload=file and prompts_file=FILE need each other; set both or none.")
    return prompts.read_file(config.prompts_file, config.sampling) if config.prompts_file is not None else None


COMMAND = job.command("throughput", ThroughputConfig, INTRO, _measure)
main = COMMAND.main
