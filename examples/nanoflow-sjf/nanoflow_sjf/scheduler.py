"""In which order requests are served; all else is what every scheduler with continuous batching does."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.plugin import (
    ContinuousScheduler,
    SchedulerConfig,
    SchedulerContext,
    Sequence,
    is_number,
    option,
    require,
)


@dataclass(frozen=True)
class ShortestConfig(SchedulerConfig):
    aging: float = option(1.0, "tokens by which each later request counts as longer; > 0, so that nobody starves")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.aging) and self.aging > 0, "scheduler.aging", self.aging, "a number > 0")


class ShortestScheduler(ContinuousScheduler):
    """Serves the request with the fewest tokens of prompt and longest output, and counts later ones as longer."""

    def __init__(self, config: ShortestConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.aging = config.aging

    def rank(self, sequence: Sequence) -> float:
        return sequence.num_prompt_tokens + sequence.max_tokens + self.aging * self.num_added
