"""A table with a role that several plugins serve, and one from which requests choose, and plugins for these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nanoflow import Component, hookimpl
from nanoflow.core.config.fields import is_int, option, require
from nanoflow.core.registry.roles import ROLES, Role, table
from tests.core.scripted import entry_point


class Watcher(ABC):
    """Is told of things."""

    @abstractmethod
    def on_thing(self, thing: str) -> str:
        """Take notice of one."""


class Filter(ABC):
    """Lets things pass."""

    @abstractmethod
    def passes(self, thing: str) -> bool:
        """Whether this one may pass."""


@dataclass(frozen=True)
class WatcherContext:
    """What a watcher is built from."""

    place: str


@dataclass(frozen=True)
class FilterContext:
    """What a filter is built from."""

    place: str


@dataclass(frozen=True)
class LoudOptions:
    """Options of the plugin `loud`."""

    times: int = option(1, "how often it says a thing")

    def __post_init__(self) -> None:
        require(is_int(self.times) and self.times >= 1, "watchers.times", self.times, "an integer >= 1")


class Loud(Watcher):
    def __init__(self, config: LoudOptions, context: WatcherContext) -> None:
        self.config, self.context = config, context

    def on_thing(self, thing: str) -> str:
        return " ".join([f"{self.context.place}: {thing.upper()}"] * self.config.times)


class Quiet(Watcher):
    def __init__(self, config: Any, context: WatcherContext) -> None:
        pass

    def on_thing(self, thing: str) -> str:
        return "..."


class Short(Filter):
    def __init__(self, config: Any, context: FilterContext) -> None:
        pass

    def passes(self, thing: str) -> bool:
        return len(thing) < 4


def fails(config: Any, context: Any) -> Filter:
    raise ZeroDivisionError("division by zero")


@hookimpl
def nanoflow_watchers() -> list[Component]:
    return [
        Component("loud", build=Loud, config=LoudOptions), Component("quiet", build=Quiet),
        Component("far", build=Quiet, available=lambda: "it is not here."),
    ]  # fmt: skip


@hookimpl
def nanoflow_filters() -> list[Component]:
    return [
        Component("short", build=Short), Component("broken", build=fails),
        Component("far", build=Short, available=lambda: "it is not here."),
        Component("choosy", build=Short, supports=lambda config, context: f"it does not like {context.place}."),
    ]  # fmt: skip


TABLE = table(
    *ROLES.values(),
    Role("watchers", "nanoflow_watchers", Watcher, WatcherContext, cardinality="several"),
    Role("filters", "nanoflow_filters", Filter, FilterContext, cardinality="by_request"),
)
PLUGIN = SimpleNamespace(nanoflow_watchers=nanoflow_watchers, nanoflow_filters=nanoflow_filters)
POINTS = [entry_point(PLUGIN, "w", "watching")]
