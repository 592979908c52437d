"""Options of each kind of workload, and how often to measure it. The sizes are those of nano-vLLM's benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nanoflow.core.config.errors import ConfigError, did_you_mean
from nanoflow.core.config.fields import is_int, is_number, option, require


@dataclass(frozen=True)
class WorkloadOptions:
    """What every measurement has.

    Raises:
        ConfigError: an unknown workload, or a value out of its range.
    """

    workloads: ClassVar[tuple[str, ...]] = ()

    workload: str = ""
    seed: int = option(0, "seeds token ids, random lengths and arrivals")
    output: str | None = option(None, "JSON file for the results; a sweep puts it into each job's folder")

    def __post_init__(self) -> None:
        if self.workload not in self.workloads:
            raise ConfigError(
                f"workload must be one of {', '.join(self.workloads)}, got {self.workload!r}."
                f"{did_you_mean(self.workload, self.workloads)}"
            )
        require(is_int(self.seed), "seed", self.seed, "an integer")


@dataclass(frozen=True)
class BenchOptions(WorkloadOptions):
    """What every measurement has that is done over and over."""

    warmup: int = option(1, "rounds that don't count, before those that do")
    repeats: int = option(3, "rounds that count; the results are their median, least and most")
    profile: str | None = option(None, "Chrome trace of some steps, .json or .json.gz; prints their top kernels")
    profile_steps: int = option(16, "steps in the trace")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"warmup": 0, "repeats": 1, "profile_steps": 1}.items():
            _require_count(name, getattr(self, name), least)


@dataclass(frozen=True)
class ThroughputOptions(BenchOptions):
    """Many requests at once, from the first handed over to the last completed."""

    workloads = ("offline256", "random", "file")

    workload: str = option("offline256", "offline256: that of nano-vLLM | random | file: prompts_file, with sampling.*")
    num_prompts: int = option(256, "prompts of offline256 and random")
    min_input_len: int = option(100, "tokens in the shortest prompt")
    max_input_len: int = option(1024, "tokens in the longest prompt")
    min_output_len: int = option(100, "tokens in the shortest output")
    max_output_len: int = option(1024, "tokens in the longest output")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_count("num_prompts", self.num_prompts)
        _require_lengths(self)


@dataclass(frozen=True)
class LatencyOptions(BenchOptions):
    """Few requests at once, a step at a time."""

    workloads = ("decode", "ttft-128", "start")

    workload: str = option("decode", "decode: a step | ttft-128: time to first token | start: process to first token")
    batch_sizes: list[int] = option([1, 8, 64], "sequences that decode at a time, measured one after the other")
    input_len: int = option(128, "tokens in each prompt of decode")
    output_len: int = option(513, "tokens in each output of decode; the time for 1 is taken off that for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.batch_sizes
        require(
            isinstance(sizes, list) and bool(sizes) and all(is_int(size) and size >= 1 for size in sizes),
            "batch_sizes", sizes, "a list of integers >= 1",
        )  # fmt: skip
        _require_count("input_len", self.input_len)
        _require_count("output_len", self.output_len, 2)
        require(
            self.profile is None or self.workload != "start", "profile", self.profile, "null for the workload start"
        )


@dataclass(frozen=True)
class ServingOptions(WorkloadOptions):
    """Requests that arrive over time."""

    workloads = ("families", "file")

    workload: str = option("families", "families: prompts that share prefixes | file: prompts_file, with sampling.*")
    num_prompts: int = option(1000, "requests of families")
    rate: float = option(10.0, "requests a second, as a Poisson process; 0: all at once")
    step_ms: float | None = option(None, "virtual time: a step takes so long on any machine; null: the time there is")
    families: int = option(16, "shared prefixes; the k-th is 1/k as frequent as the first")
    prefix_len: int = option(64, "tokens in each shared prefix")
    min_input_len: int = option(4, "tokens of its own in the shortest prompt")
    max_input_len: int = option(64, "tokens of its own in the longest prompt")
    min_output_len: int = option(4, "tokens in the shortest output")
    max_output_len: int = option(64, "tokens in the longest output")
    priorities: int = option(3, "priorities 0, 1, ... are drawn from so many")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "families", "priorities"):
            _require_count(name, getattr(self, name))
        _require_count("prefix_len", self.prefix_len, 0)
        require(is_number(self.rate) and self.rate >= 0, "rate", self.rate, "a number >= 0")
        step = self.step_ms
        require(step is None or (is_number(step) and step > 0), "step_ms", step, "a number > 0 or null")
        _require_lengths(self)


def _require_lengths(options: ThroughputOptions | ServingOptions) -> None:
    for kind in ("input_len", "output_len"):
        least, most = getattr(options, f"min_{kind}"), getattr(options, f"max_{kind}")
        _require_count(f"min_{kind}", least)
        require(is_int(most) and most >= least, f"max_{kind}", most, f"an integer >= min_{kind} ({least})")


def _require_count(name: str, value: object, least: int = 1) -> None:
    require(is_int(value) and value >= least, name, value, f"an integer >= {least}")
