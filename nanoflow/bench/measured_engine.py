"""An engine under measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from nanoflow.bench import device, profile
from nanoflow.bench.result import Floor, Result
from nanoflow.bench.rounds import Rounds
from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.execution.plan import pick_device, pick_dtype
from nanoflow.core.loading import read_config, resolve
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads import floor
from nanoflow.workloads.offline import Workload

IDLE_STEPS = 128  # so that one hiccup of the host or the profiler is a small part of them


class MeasuredEngine:
    """Measures the speed of the device, then builds an engine, which any number of workloads may use.

    Args:
        config: of the engine.
        registry: installed plugins.

    Attributes:
        speed: the device's; of all of them together, if the engine has several.
        vocab_size: V.
        max_num_seqs: most sequences in a batch.

    Raises:
        NanoflowError: what the user can cause, as building an engine does.
    """

    def __init__(self, config: Config, registry: Registry) -> None:
        hf_config = read_config(resolve(config.checkpoint, revision=config.engine.revision))
        target = pick_device(config.engine.device)
        dtype = pick_dtype(config.engine.dtype, hf_config, target)
        self.cuda = target.type == "cuda"
        self.vocab_size: int = hf_config["vocab_size"]
        self.max_num_seqs: int = registry.resolve("scheduler", config.plugins.get("scheduler"))[1].max_num_seqs
        self.dims = floor.Dims.from_config(hf_config, dtype.itemsize)
        count = config.engine.tensor_parallel_size if self.cuda else 1  # on a CPU, ranks share one
        self.speed = device.measure(target, dtype).times(count)  # first, since the engine takes most of the memory
        self.llm = LLM.from_config(config, registry)

    def __enter__(self) -> MeasuredEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.close()

    @property
    def description(self) -> dict[str, str]:
        """Checkpoint, the plugin of each role, device and dtype."""
        return self.llm.describe()

    def encode(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts as `LLM.generate` takes them."""
        return [self.llm.encode(prompt, index)[1] for index, prompt in enumerate(prompts)]

    def measure(self, workload: Workload, rounds: Rounds) -> Result:
        """What its name says: a decode step, the time to the first token, or the throughput."""
        kind = workload.name.partition("-")[0]
        return {"decode": self.decode, "ttft": self.ttft}.get(kind, self.throughput)(workload, rounds)

    def throughput(self, workload: Workload, rounds: Rounds) -> Result:
        """All requests of `workload` at once."""
        timed = rounds.run(workload.name, lambda number: self._generate(workload, number))
        seconds = [elapsed for elapsed, _ in timed]
        outputs = timed[-1][1]
        lengths = [(len(output.prompt_token_ids), len(output["token_ids"])) for output in outputs]
        first_tokens = [output.metrics.ttft for output in outputs if output.metrics.ttft is not None]
        return Result(
            workload.name,
            "tok/s",
            seconds,
            tokens=[sum(len(output["token_ids"]) for output in outputs) for _, outputs in timed],
            floor=self._floor(lambda dims: floor.work(dims, lengths, self.max_num_seqs)),
            details={
                "requests": len(lengths),
                "prompt_tokens": sum(prompt for prompt, _ in lengths),
                "output_tokens": sum(output for _, output in lengths),
                "ttft_ms": 1000 * sum(first_tokens) / max(len(first_tokens), 1),
                "cached_prompt_tokens": sum(output.num_cached_tokens for output in outputs),
                "preemptions": sum(output.metrics.num_preemptions for output in outputs),
            },
        )

    def decode(self, workload: Workload, rounds: Rounds) -> Result:
        """A decode step of requests of equal lengths: the time for their outputs without that for one token, by steps.

        Raises:
            ConfigError: more sequences than the scheduler batches.
        """
        batch_size, input_len, output_len = workload.shape
        if batch_size > self.max_num_seqs:
            raise ConfigError(
                f"{workload.name} needs scheduler.max_num_seqs={batch_size} or more, got {self.max_num_seqs}."
            )
        short = workload.cut(1)

        def step(number: int) -> float:
            first, _ = self._generate(short, 2 * number + 1)
            whole, _ = self._generate(workload, 2 * number)
            return (whole - first) / (output_len - 1)

        return Result(
            workload.name,
            "ms",
            rounds.run(workload.name, step),
            floor=self._floor(lambda dims: floor.decode_step(dims, batch_size, input_len, output_len)),
        )

    def ttft(self, workload: Workload, rounds: Rounds) -> Result:
        """Time to the first tokens of `workload`, with nothing else to do."""
        num_prompts, input_len, _ = workload.shape
        return Result(
            workload.name,
            "ms",
            rounds.run(workload.name, lambda number: self._generate(workload, number)[0]),
            floor=self._floor(lambda dims: floor.work(dims, [(input_len, 1)] * num_prompts, self.max_num_seqs)),
        )

    def idle(self, workload: Workload, rounds: Rounds) -> profile.Idle | None:
        """The GPU's idle share in decode steps of `workload`; None without a GPU."""
        if not self.cuda:
            return None
        return profile.idle(self.profile_decode(workload, rounds, IDLE_STEPS))

    def profile_decode(
        self, workload: Workload, rounds: Rounds, num_steps: int, path: Path | None = None
    ) -> list[dict[str, Any]]:
        """Events of decode steps, once all prompts are computed; see `profile.record`."""
        engine = self.llm.engine
        requests = zip(workload.round(_after(rounds) + (path is not None)), workload.params, strict=True)
        names = []
        try:
            for index, (prompt, params) in enumerate(requests):
                names.append(f"profiled-{index}")
                engine.add_request(names[-1], prompt, params)
            prefilled = -1
            while engine.has_unfinished and engine.stats.num_prefill_tokens != prefilled:
                prefilled = engine.stats.num_prefill_tokens
                engine.step()
            return profile.record(engine.step, num_steps, path, cuda=self.cuda)
        finally:
            for name in names:
                engine.abort(name)
            while engine.in_flight:
                engine.step()

    def profile_prefill(self, workload: Workload, rounds: Rounds, num_steps: int, path: Path) -> list[dict[str, Any]]:
        """Events of whole rounds of `workload`, whose outputs have one token; see `profile.record`."""
        numbers = count(_after(rounds))
        return profile.record(lambda: self._generate(workload, next(numbers)), num_steps, path, cuda=self.cuda)

    def _generate(self, workload: Workload, number: int) -> tuple[float, list[Any]]:
        """Seconds, and the outputs."""
        prompts = workload.round(number)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, workload.params, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def _floor(self, work: Callable[[floor.Dims], dict[str, floor.Work]]) -> Floor | None:
        return Floor(work(self.dims), self.speed) if self.dims else None


def _after(rounds: Rounds) -> int:
    """A round's number that no measurement has had."""
    return 2 * (rounds.warmup + rounds.repeats) + 1
