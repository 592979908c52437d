"""Which of the waiting requests is admitted next; all else is as in first come, first served."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanoflow.core.config import SchedulerConfig, is_number, option, require
from nanoflow.core.interfaces import SchedulerContext
from nanoflow.core.types import Batch, Sequence
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler


@dataclass(frozen=True)
class ShortestConfig(SchedulerConfig):
    aging: float = option(1.0, "tokens by which each later request counts as longer; > 0, so that nobody starves")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.aging) and self.aging > 0, "scheduler.aging", self.aging, "a number > 0")


class ShortestScheduler(FCFSScheduler):
    """Admits the request with the fewest tokens of prompt and longest output, and counts later ones as longer."""

    def __init__(self, config: ShortestConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.aging = config.aging
        self.num_added = 0
        self.lengths: dict[str, float] = {}  # of unfinished requests

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        length = sequence.num_prompt_tokens + sequence.max_tokens
        self.lengths[sequence.request_id] = length + self.aging * self.num_added
        self.num_added += 1

    def abort(self, request_id: str) -> Sequence | None:
        self.lengths.pop(request_id, None)
        return super().abort(request_id)

    def schedule(self) -> Batch | None:
        self.waiting = deque(sorted(self.waiting, key=lambda sequence: self.lengths[sequence.request_id]))
        return super().schedule()

    def update(self, batch: Batch) -> list[Sequence]:
        finished = super().update(batch)
        for sequence in finished:
            del self.lengths[sequence.request_id]
        return finished
