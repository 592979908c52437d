"""Output tokens a second of many requests at once."""

from __future__ import annotations

from dataclasses import replace

from nanoflow.bench.job import BenchJob
from nanoflow.bench.measured_engine import MeasuredEngine
from nanoflow.bench.report import Report
from nanoflow.bench.timings import report
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads import offline
from nanoflow.workloads.offline import Workload


def measure(job: BenchJob, registry: Registry) -> Report:
    """The rate over some rounds, the GPU's idle share, and a profile if one is wanted.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    with MeasuredEngine(job.build, registry) as engine:
        workload, rounds = _workload(job, engine), job.rounds
        result = replace(engine.throughput(workload, rounds), idle=engine.idle(workload, rounds))
        events = []
        if job.profile:
            events = engine.profile_decode(workload, rounds, job.options.profile_steps, job.profile)
        return report(engine.description, [result], engine.speed, events)


def _workload(job: BenchJob, engine: MeasuredEngine) -> Workload:
    if job.given is None:
        make = offline.offline256 if job.options.workload == "offline256" else offline.uniform
        return make(job.options, job.sampling, engine.vocab_size)
    prompts, params = job.given
    return Workload("file", engine.encode(prompts), params, engine.vocab_size, modulus=engine.vocab_size)
