"""Built-in schedulers."""

from __future__ import annotations

from nanoflow.core.config import SchedulerConfig
from nanoflow.core.hookspecs import hookimpl
from nanoflow.core.interfaces import Component
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler


@hookimpl
def nanoflow_schedulers() -> list[Component]:
    return [Component("fcfs", build=FCFSScheduler, config=SchedulerConfig)]
