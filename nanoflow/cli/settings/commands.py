"""The settings of each command, and the yaml file with what differs from their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.cli.settings.schema import Settings
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT
from nanoflow.core.config.fields import option
from nanoflow.workloads.options import LatencyOptions, ServingOptions, ThroughputOptions, WorkloadOptions

CHECKPOINT_HELP = "a folder, a Hub id, bard, or qwen3-0.6b to qwen3-32b, qwen3-30b-a3b for engine.load_format=dummy"


@dataclass(frozen=True)
class RunConfig(Settings):
    """What `run` builds, and what it does with it."""

    prompts: list[str] = option([], "texts to complete")
    prompts_file: str | None = option(
        None, "prompts from a file: a line each, or .jsonl objects; - is standard input; replaces prompts"
    )
    output: str | None = option(
        None, "JSON lines file for the completions, continued if it is there; a sweep puts it into each job's folder"
    )


@dataclass(frozen=True)
class ChatConfig(Settings):
    """What `chat` builds, and how the conversation begins."""

    system: str | None = option(None, "what the model is told before the conversation")


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


# Primary configs by name: the file with what differs from the defaults, and the dataclass with the defaults.
PRIMARIES: dict[str, tuple[str, type[Settings]]] = {
    "config": ("config", RunConfig),
    "chat": ("chat", ChatConfig),
    "throughput": ("bench", ThroughputConfig),
    "latency": ("bench", LatencyConfig),
    "serving": ("bench", ServingConfig),
}
