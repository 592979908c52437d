"""What to measure on which engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.bench.rounds import Rounds
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.sampling_params import SamplingParams


@dataclass(frozen=True)
class BenchJob:
    """What the `measure` of each kind of benchmark takes.

    Attributes:
        build: of the engine.
        sampling: of all requests, but for what `given` says.
        options: of the workload: `ThroughputOptions`, `LatencyOptions` or `ServingOptions`.
        given: prompts from a file and how to sample each, for the workload `file`; None for the others.
        profile: where to write a trace of some steps; None for none.
        progress: show a bar.
    """

    build: Config
    sampling: SamplingParams
    options: Any
    given: tuple[list[Any], list[SamplingParams]] | None = None
    profile: Path | None = None
    progress: bool = False

    @property
    def rounds(self) -> Rounds:
        """How often to measure."""
        return Rounds(self.options.warmup, self.options.repeats, self.progress)
