"""The most urgent first, and older ones more urgent with time."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.fields import is_int, option, require
from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class PriorityConfig(SchedulerConfig):
    """Options of `priority`.

    Raises:
        ConfigError: a value out of its range.
    """

    aging: int | None = option(1000, "steps of waiting that are worth one level of priority; null: no aging")

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.aging is None or (is_int(self.aging) and self.aging >= 1)
        require(valid, "scheduler.aging", self.aging, "an integer >= 1 or null")


class PriorityScheduler(ContinuousScheduler):
    """Serves sequences by `SamplingParams.priority`, the smallest number first, as vLLM does.

    All who wait age alike, so the order of two sequences never changes: `priority * aging` steps are a handicap at the
    start, and a request `d` levels less urgent waits for those that come up to `d * aging` steps after it. Without
    aging it may wait for ever.
    """

    def __init__(self, config: PriorityConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.aging = config.aging

    def rank(self, sequence: Sequence) -> int:
        priority = sequence.params.priority
        return priority if self.aging is None else priority * self.aging + self.num_steps
