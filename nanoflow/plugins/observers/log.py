"""Warnings by `logging` about what makes an engine slow: slow steps, and preemptions that come in storms.

It says nothing while all is well, and no more than one sentence of a kind in `period` seconds.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from nanoflow.core.config.fields import is_int, is_number, option, require
from nanoflow.core.contracts.observer import Observer, ObserverContext
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import PreemptReason, WaitReason
from nanoflow.core.data.sequence import Sequence

logger = logging.getLogger("nanoflow")


@dataclass(frozen=True)
class LogConfig:
    """Options of `log`.

    Raises:
        ConfigError: a value out of its range.
    """

    slow_step: float = option(2.0, "seconds from submitting a step to its tokens after which it is called slow")
    preemptions: int = option(20, "preemptions within a period that are too many")
    period: float = option(10.0, "seconds; preemptions are counted over them, and no warning comes twice in them")

    def __post_init__(self) -> None:
        require(is_number(self.slow_step) and self.slow_step > 0, "observers.slow_step", self.slow_step,
                "a number > 0")  # fmt: skip
        require(is_int(self.preemptions) and self.preemptions >= 1, "observers.preemptions", self.preemptions,
                "an integer >= 1")  # fmt: skip
        require(is_number(self.period) and self.period > 0, "observers.period", self.period, "a number > 0")


class LogObserver(Observer):
    """Logs to `nanoflow` at the level WARNING.

    Attributes:
        submitted: when each step in flight was submitted, oldest first.
        preempted: when sequences lost their blocks, within the last period.
        waiting: why others wait, as of the last batch.
    """

    def __init__(self, config: LogConfig, context: ObserverContext) -> None:
        self.config = config
        self.clock = context.clock
        self.num_blocks = context.num_blocks
        self.submitted: deque[float] = deque()
        self.preempted: deque[float] = deque()
        self.waiting: list[WaitReason] = []
        self.last_warning: dict[str, float] = {}

    def on_schedule(self, batch: Batch, reasons: list[WaitReason]) -> None:
        self.waiting = reasons
        self.submitted.append(self.clock())

    def on_result(self, batch: Batch) -> None:
        seconds = self.clock() - self.submitted.popleft()
        if seconds > self.config.slow_step:
            self._warn(
                "slow_step", f"a step of {len(batch.sequences)} sequences and {batch.total_tokens} tokens took "
                f"{seconds:.1f} s{self._queue()}"
            )  # fmt: skip

    def on_preempt(self, sequence: Sequence, reason: PreemptReason | None) -> None:
        now, config = self.clock(), self.config
        self.preempted.append(now)
        while self.preempted[0] < now - config.period:
            self.preempted.popleft()
        if len(self.preempted) >= config.preemptions:
            self._warn(
                "preemptions", f"{len(self.preempted)} times in {config.period:g} s a sequence lost its KV blocks, of "
                f"which there are {self.num_blocks}, and is computed again{self._queue()}; lower "
                f"scheduler.max_num_seqs, or make the cache larger"
            )  # fmt: skip

    def _queue(self) -> str:
        """Who waits and why, to be appended to a sentence."""
        if not self.waiting:
            return ""
        first = self.waiting[0]
        return f" ({first.num_behind + 1} sequences wait, the first for {first.cause})"

    def _warn(self, kind: str, sentence: str) -> None:
        now = self.clock()
        if now - self.last_warning.get(kind, -float("inf")) >= self.config.period:
            self.last_warning[kind] = now
            logger.warning("%s", sentence)
