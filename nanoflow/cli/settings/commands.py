"""The settings of each command, and the yaml file with what differs from their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanoflow.cli.settings.schema import Settings
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import option, require
from nanoflow.core.registry.registry import Registry
from nanoflow.workloads.options import LatencyOptions, ServingOptions, ThroughputOptions, WorkloadOptions

RECORD, STOP = "record", "stop"  # values of on_error
CHECKPOINT_HELP = "a folder, a Hub id, bard, or qwen3-0.6b to qwen3-32b, qwen3-30b-a3b for engine.load_format=dummy"


@dataclass(frozen=True)
class RunConfig(Settings):
    """What `run` builds, and what it does with it."""

    prompts: list[str] = option([], "texts to complete: a list, or one by itself; \\n in double quotes is a newline")
    prompts_file: str | None = option(
        None, "prompts from a file: a line each, or .jsonl objects; - is standard input; replaces prompts"
    )
    output: str | None = option(
        None, "JSON lines file for the completions, continued if it is there; a sweep puts it into each job's folder"
    )
    on_error: str | None = option(
        None,
        "a prompt that can't be served: record it with its error and go on | stop; null: record from prompts_file to "
        "output, else stop",
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for what does not go together."""
        choices = (None, RECORD, STOP)
        require(self.on_error in choices, "on_error", self.on_error, f"{RECORD}, {STOP} or null")
        if self.on_error == RECORD and self.output is None:
            raise ConfigError(f"on_error={RECORD} needs a file for the records; write output=FILE, too.")

    @classmethod
    def from_values(cls, values: dict[str, Any], registry: Registry) -> RunConfig:
        """As for all settings; one prompt by itself is a list of one."""
        if isinstance(values.get("prompts"), str):
            values = {**values, "prompts": [values["prompts"]]}
        return super().from_values(values, registry)

    @property
    def records_errors(self) -> bool:
        """Whether a prompt that can't be served becomes a record, and the run goes on."""
        default = STOP if self.prompts_file is None or self.output is None else RECORD
        return (self.on_error or default) == RECORD


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
