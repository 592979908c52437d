"""Built-in schedulers."""

from __future__ import annotations

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.registry.component import Component
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler
from nanoflow.plugins.schedulers.lpm import LPMConfig, LPMScheduler
from nanoflow.plugins.schedulers.priority import PriorityConfig, PriorityScheduler
from nanoflow.plugins.schedulers.sjf import SJFConfig, SJFScheduler


@hookimpl
def nanoflow_schedulers() -> list[Component]:
    return [
        Component("fcfs", build=FCFSScheduler, config=SchedulerConfig),
        Component("priority", build=PriorityScheduler, config=PriorityConfig),
        Component("sjf", build=SJFScheduler, config=SJFConfig),
        Component("lpm", build=LPMScheduler, config=LPMConfig),
    ]
