"""Time of a decode step, to the first token, or from the start of a process to its first token."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.bench import start
from nanoflow.bench.job import BenchJob
from nanoflow.bench.report import Report
from nanoflow.bench.timings import report
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads import offline


def measure(job: BenchJob, registry: Registry) -> Report:
    """The time over some rounds, of each batch size if steps are measured, and a profile if one is wanted.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    options, rounds = job.options, job.rounds
    if options.workload == "start":  # the engine is another process's
        result, description = start.result(job.build, rounds)
        return report(description, [result], None, [])
    from nanoflow.bench.measured_engine import MeasuredEngine

    with MeasuredEngine(job.build, registry) as engine:
        common = (options, job.sampling, engine.vocab_size)
        if options.workload == "decode":
            requests = [offline.decode(size, *common) for size in options.batch_sizes]
            results = [replace(engine.decode(w, rounds), idle=engine.idle(w, rounds)) for w in requests]
            profile = engine.profile_decode
        else:
            requests = [offline.first_token(128, *common)]
            results = [engine.ttft(workload, rounds) for workload in requests]
            profile = engine.profile_prefill
        events = profile(requests[-1], rounds, options.profile_steps, job.profile) if job.profile else []
        return report(engine.description, results, engine.speed, events)
