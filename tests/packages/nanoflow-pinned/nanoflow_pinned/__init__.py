"""A scheduler that was made before there was a contract with plugins; all else about it is right."""

from __future__ import annotations

from nanoflow.plugin import Component, ContinuousScheduler, SchedulerConfig, Sequence, hookimpl

nanoflow_contract = 0


class PinnedScheduler(ContinuousScheduler):
    def rank(self, sequence: Sequence) -> int:
        return self.num_added


@hookimpl
def nanoflow_schedulers() -> list[Component]:
    return [Component("pinned", build=PinnedScheduler, config=SchedulerConfig)]
