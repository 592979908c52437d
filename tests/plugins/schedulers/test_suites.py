"""The built-in schedulers run the kit's suite."""

from __future__ import annotations

from typing import ClassVar

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.data.batch import Batch
from nanoflow.testing import SchedulerSuite
from nanoflow.testing.world import Plan, World


class FCFSWorld(World):
    """First come, first served: what arrives later never hinders what came before."""

    def check_batch(self, batch: Batch | None, before: Plan, lost: set[str]) -> None:
        names = [sequence.request_id for sequence in batch.sequences] if batch else []
        assert all(name in names or name in lost for name in before.decoding), "a decode was left out"
        first = self.live[0].sequence.request_id if self.live else None
        assert first not in lost, "the oldest request lost its blocks"
        assert first is None or not before.due[first] or first in names, "the oldest request was left out"

    def check(self) -> None:
        super().check()
        holding = [r.arrival for r in self.live if r.holds_blocks]
        waiting = [r.arrival for r in self.live if not r.holds_blocks]
        if holding and waiting:
            assert holding[-1] < waiting[0], "a later request holds blocks while an earlier one waits"


class TestFCFS(SchedulerSuite):
    component = "fcfs"
    num_steps = 20_000  # of each of four combinations
    patience = 100
    world = FCFSWorld


class TestPriority(SchedulerSuite):
    component = "priority"
    options: ClassVar = {"aging": 100}
    urgent = SamplingParams(priority=-3)


class TestSJF(SchedulerSuite):
    component = "sjf"


class TestLPM(SchedulerSuite):
    component = "lpm"
    options: ClassVar = {"window": 4, "max_wait": 50}
    patience = 1_000
