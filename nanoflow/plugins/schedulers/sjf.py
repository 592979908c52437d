"""The shortest job first, and older ones shorter with time."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.fields import is_number, option, require
from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class SJFConfig(SchedulerConfig):
    """Options of `sjf`.

    Raises:
        ConfigError: a value out of its range.
    """

    aging: float = option(1.0, "tokens that a step of waiting takes off a job; 0: no aging")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.aging) and self.aging >= 0, "scheduler.aging", self.aging, "a number >= 0")


class SJFScheduler(ContinuousScheduler):
    """Serves the sequences first that have the fewest tokens of prompt and output.

    The output is taken to be as long as it may get, since `max_tokens` is all that anybody has said about it: right
    for callers who say what they need, and no better than first come, first served for those who all say the same.
    """

    def __init__(self, config: SJFConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.aging = config.aging

    def rank(self, sequence: Sequence) -> float:
        return sequence.num_prompt_tokens + sequence.max_tokens + self.aging * self.num_steps
