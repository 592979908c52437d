"""Built-in schedulers."""

from __future__ import annotations

from nanoflow.core.hookspecs import hookimpl
from nanoflow.core.interfaces import Component
from nanoflow.plugins.schedulers.fcfs import FCFSConfig, FCFSScheduler


@hookimpl
def nanoflow_schedulers() -> list[Component]:
    return [Component("fcfs", build=FCFSScheduler, config=FCFSConfig)]
