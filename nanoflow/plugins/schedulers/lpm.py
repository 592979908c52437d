"""The longest prefix match first, so that sequences with a common prefix run together.

The idea comes from SGLang's cache-aware scheduling (RadixAttention, NeurIPS 2024).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.fields import is_int, option, require
from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.contracts.waiting_line import Place
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class LPMConfig(SchedulerConfig):
    """Options of `lpm`.

    Raises:
        ConfigError: a value out of its range.
    """

    window: int = option(64, "how many of the oldest waiting sequences to choose from; bounds the work of a step")
    max_wait: int = option(500, "steps after which a waiting sequence comes first, whatever the cache holds")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"window": 1, "max_wait": 0}.items():
            value = getattr(self, name)
            require(is_int(value) and value >= least, f"scheduler.{name}", value, f"an integer >= {least}")


class LPMScheduler(ContinuousScheduler):
    """Serves the sequences first of which the prefix cache holds most, before it is evicted."""

    def __init__(self, config: LPMConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.window = config.window
        self.max_wait = config.max_wait

    def rank(self, sequence: Sequence) -> int:
        return self.num_steps

    def candidates(self) -> list[Place]:
        oldest = self.waiting[: self.window]
        num_overdue = bisect_left(oldest, self.num_steps - self.max_wait, key=lambda place: place.rank)
        rest = sorted(oldest[num_overdue:], key=lambda place: -self.blocks.match(place.sequence))
        return oldest[:num_overdue] + rest
