"""The settings of `bench throughput`, `bench latency` and `bench serving`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.bench.options import LatencyOptions, ServingOptions, ThroughputOptions, WorkloadOptions
from nanoflow.cli.settings import Settings
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT
from nanoflow.core.config.fields import option

CHECKPOINT_HELP = "a folder, a Hub id, bard, or qwen3-0.6b to qwen3-32b, qwen3-30b-a3b for engine.load_format=dummy"


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What all build; what they measure differs."""

    checkpoint: str = option(BUNDLED_CHECKPOINT, CHECKPOINT_HELP)
    bench: WorkloadOptions = field(default_factory=WorkloadOptions)


@dataclass(frozen=True)
class ThroughputConfig(BenchConfig):
    """All settings of `bench throughput`."""

    bench: ThroughputOptions = field(default_factory=ThroughputOptions)
    prompts_file: str | None = option(None, "prompts of bench.workload=file: a line each, or .jsonl objects")


@dataclass(frozen=True)
class LatencyConfig(BenchConfig):
    """All settings of `bench latency`."""

    bench: LatencyOptions = field(default_factory=LatencyOptions)


@dataclass(frozen=True)
class ServingConfig(BenchConfig):
    """All settings of `bench serving`."""

    bench: ServingOptions = field(default_factory=ServingOptions)
    prompts_file: str | None = option(None, "requests of bench.workload=file: a line each, or .jsonl objects")
