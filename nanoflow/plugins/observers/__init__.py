"""Built-in observers."""

from __future__ import annotations

from nanoflow.core.registry.component import Component
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.plugins.observers.log import LogConfig, LogObserver


@hookimpl
def nanoflow_observers() -> list[Component]:
    return [Component("log", build=LogObserver, config=LogConfig)]
