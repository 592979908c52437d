"""Requests that arrive over time, and how long each of them waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanoflow.bench.job import BenchJob
from nanoflow.bench.progress import Progress
from nanoflow.bench.report import Report
from nanoflow.bench.serving_report import Served, report
from nanoflow.core.api.llm import LLM
from nanoflow.core.config.sampling_params import RequestOutputKind
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.engine.engine import Engine
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads import arrivals as workloads
from nanoflow.workloads.arrivals import Arrival


def measure(job: BenchJob, registry: Registry) -> Report:
    """Hand the requests of `job` over when their time has come.

    Raises:
        NanoflowError: whatever a user can cause.
    """
    with LLM.from_config(job.build, registry) as llm:
        arrivals = _arrivals(job, llm)
        llm.generate([[1, 2, 3]], job.sampling, use_tqdm=False)  # what is compiled or allocated at first use
        queried, hits = llm.stats.num_queried_tokens, llm.stats.num_hit_tokens
        clock = Clock(job.options.step_ms / 1000 if job.options.step_ms else None)
        with Progress("serving", len(arrivals), "request", bar=job.progress) as progress:
            served = serve(llm.engine, arrivals, clock, progress.add)
        queried, hits = llm.stats.num_queried_tokens - queried, llm.stats.num_hit_tokens - hits
        return report(llm.describe(), clock.now, served, 100 * hits / queried if queried else 0.0)


def _arrivals(job: BenchJob, llm: LLM) -> list[Arrival]:
    if job.given is None:
        return workloads.families(job.options, job.sampling, llm.engine.vocab_size)
    prompts, params = job.given
    encoded = [llm.encode(prompt, index)[1] for index, prompt in enumerate(prompts)]
    return workloads.poisson(encoded, params, job.options.rate, job.options.seed)


class Clock:
    """Seconds since the start: those that pass, or virtual ones.

    Args:
        step: virtual seconds that a step takes; None for real time.
    """

    def __init__(self, step: float | None = None) -> None:
        self.step = step
        self.start = 0.0 if step else time.perf_counter()
        self.virtual = 0.0

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.virtual if self.step else time.perf_counter() - self.start

    def wait_until(self, moment: float) -> None:
        """Let time pass; nothing happens until then."""
        if self.step:
            self.virtual = max(self.virtual, moment)
        else:
            time.sleep(max(0.0, moment - self.now))

    def tick(self) -> None:
        """A step was done."""
        self.virtual += self.step or 0.0


def serve(
    engine: Engine, arrivals: list[Arrival], clock: Clock, on_served: Callable[[], None] = lambda: None
) -> list[Served]:
    """Hand each request over when its time has come; returns what became of each, in order.

    A request counts as waiting from its arrival on, also while a step keeps it from being handed over. A token is there
    when the step has brought it to the host.

    Raises:
        RequestError: a request that can't be served; all are checked first.
    """
    for arrival in arrivals:
        engine.admission.check(arrival.prompt, arrival.params)
    first_tokens: dict[int, float] = {}
    served: dict[int, Served] = {}
    next_one = 0
    while len(served) < len(arrivals):
        while next_one < len(arrivals) and arrivals[next_one].time <= clock.now:
            arrival = arrivals[next_one]
            engine.add_request(str(next_one), arrival.prompt, arrival.params, output_kind=RequestOutputKind.CUMULATIVE)
            next_one += 1
        if not engine.has_unfinished:
            clock.wait_until(arrivals[next_one].time)
            continue
        outputs = engine.step()
        clock.tick()
        now = clock.now
        for output in outputs:
            index = int(output.request_id)
            first = first_tokens.setdefault(index, now)
            if output.finished:
                served[index] = _served(output, arrivals[index], first, now)
                on_served()
    return [served[index] for index in range(len(arrivals))]


def _served(output: RequestOutput, arrival: Arrival, first_token: float, end: float) -> Served:
    num_tokens = len(output["token_ids"])
    return Served(
        priority=arrival.params.priority,
        prompt_tokens=len(output.prompt_token_ids),
        output_tokens=num_tokens,
        cached_tokens=output.num_cached_tokens,
        preemptions=output.metrics.num_preemptions,
        ttft=first_token - arrival.time,
        tpot=(end - first_token) / (num_tokens - 1) if num_tokens > 1 else None,
        e2e=end - arrival.time,
    )
