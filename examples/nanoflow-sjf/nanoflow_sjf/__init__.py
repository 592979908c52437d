"""Shortest job first, with aging, as a plugin of nanoflow."""

from __future__ import annotations

from nanoflow.plugin import Component, hookimpl
from nanoflow_sjf.scheduler import ShortestConfig, ShortestScheduler

nanoflow_contract = 1


@hookimpl
def nanoflow_schedulers() -> list[Component]:
    return [Component("shortest", build=ShortestScheduler, config=ShortestConfig)]


@hookimpl
def nanoflow_config_packages() -> list[str]:
    return ["nanoflow_sjf.conf"]
