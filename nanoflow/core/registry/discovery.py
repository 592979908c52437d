"""Finds plugins: the built-in packages and the entry points of installed ones, each asked for what it offers.

A broken third-party plugin is left out with a sentence that says why, so that it can't take the host down.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Protocol

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nanoflow.core.config.errors import PluginError, did_you_mean, shown
from nanoflow.core.config.version import DISTRIBUTION, __version__
from nanoflow.core.registry.component import Component, Entry, reason_of
from nanoflow.core.registry.contract import Contract
from nanoflow.core.registry.hookspecs import CONFIG_PACKAGES, PROJECT, plugin_manager
from nanoflow.core.registry.roles import Role, Roles

BLOCK = "NANOFLOW_BLOCK"  # environment variable: names of plugins to leave alone, with commas between them

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")  # of a component


class EntryPoint(Protocol):
    """The part of `importlib.metadata.EntryPoint` that is used here."""

    name: str
    dist: Any

    def load(self) -> Any:
        """Import what the entry point names."""


@dataclass
class Found:
    """What plugins offer.

    Attributes:
        entries: their components.
        config_packages: packages whose folders mirror `conf/`, and what distribution each is of.
        problems: one sentence for each plugin that was left out.
        blocked: plugins that were left alone on request, such as `theirs of their-package 1.2`.
    """

    entries: list[Entry] = field(default_factory=list)
    config_packages: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A plugin that was imported, and where it came from."""

    key: str
    name: str
    package: str
    version: str


class Discovery:
    """One search for plugins. The arguments are those of `Registry.load`."""

    def __init__(self, roles: Roles, contract: Contract, strict: bool) -> None:
        self.roles = roles
        self.contract = contract
        self.strict = strict
        self.manager = plugin_manager(roles)
        self.found = Found()

    def run(self, extra: Iterable[EntryPoint] | None, blocked: Iterable[str] | None) -> Found:
        """Import all plugins, then ask each for its components and config packages."""
        sources = [self._builtin(name) for name in builtin_packages()]
        points = list(entry_points(group=PROJECT) if extra is None else extra)
        names = _names(os.environ.get(BLOCK, "")) if blocked is None else set(blocked)
        for point in self._not_blocked(points, names):
            name, package, version = point.name, *origin(point)
            try:
                self._register(point, key=f"{package}:{name}")  # two packages may name their entry points alike
            except BaseException as error:
                if interrupted(error):
                    raise
                self._leave_out(name, package, version, error)
            else:
                sources.append(Source(f"{package}:{name}", name, package, version))
        for source in sources:
            try:
                entries, folders = list(self._entries(source)), list(self._config_packages(source))
            except BaseException as error:
                if interrupted(error):
                    raise
                self._leave_out(source.name, source.package, source.version, error)
            else:
                self.found.entries += entries
                self.found.config_packages |= dict.fromkeys(folders, source.package)
        return self.found

    def _builtin(self, name: str) -> Source:
        self.manager.register(import_module(name), name)
        return Source(name, name, PROJECT, __version__)

    def _not_blocked(self, points: list[EntryPoint], names: set[str]) -> list[EntryPoint]:
        known = set().union(*map(_names_of, points))
        for name in sorted(names - known):
            self.found.problems.append(
                f"There is no plugin {name!r} to block; installed are: {', '.join(sorted(known)) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
        self.found.blocked += [" ".join((p.name, "of", *origin(p))) for p in points if names & _names_of(p)]
        return [point for point in points if not names & _names_of(point)]

    def _register(self, point: EntryPoint, key: str) -> None:
        _check_requirement(point)
        plugin = point.load()
        hooks = list(_hooks_of(plugin, self.manager, [*(r.hook for r in self.roles.values()), CONFIG_PACKAGES]))
        self.contract.check(plugin, [role.name for role in self.roles.values() if role.hook in hooks])
        self.manager.register(plugin, key)

    def _leave_out(self, name: str, package: str, version: str, error: BaseException) -> None:
        parts = (reason_of(error), self.contract.explanation(error))
        problem = f"Plugin {name!r} of {package} {version} was left out: {'. '.join(filter(None, parts))}"
        if self.strict:
            raise PluginError(problem) from error
        self.found.problems.append(problem)

    def _entries(self, source: Source) -> Iterator[Entry]:
        for role in self.roles.values():
            for component in self._answer(role.hook, source):
                _check_component(role, component)
                yield Entry(role, component, source.package, source.version)

    def _config_packages(self, source: Source) -> Iterator[str]:
        for package in self._answer(CONFIG_PACKAGES, source):
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"there is no package {package!r} for hook {CONFIG_PACKAGES}")
            yield package

    def _answer(self, hook: str, source: Source) -> list[Any]:
        """What one plugin returns from one hook; plugins are asked one by one, so that each answer has an author."""
        results = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            if implementation.plugin_name == source.key:
                answer = implementation.function()
                if not isinstance(answer, list | tuple):
                    raise TypeError(f"hook {hook} returned {type(answer).__name__}, not a list")
                results += answer
        return results


def interrupted(error: BaseException) -> bool:
    """Whether it is a Ctrl-C of the user's, and not what a plugin raises by itself, whatever that is."""
    if not isinstance(error, KeyboardInterrupt) or error.__traceback__ is None:
        return False
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return place.tb_frame.f_code.co_code[place.tb_lasti] != dis.opmap["RAISE_VARARGS"]


def builtin_packages() -> list[str]:
    """The names of the packages with built-in plugins: those in `nanoflow.plugins`."""
    package = import_module("nanoflow.plugins")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__, "nanoflow.plugins."))


def origin(point: EntryPoint) -> tuple[str, str]:
    """The name and the version of the package that an entry point comes from."""
    return (point.dist.name, point.dist.version) if point.dist else ("unknown package", "?")


def _names(text: str) -> set[str]:
    return {name for name in re.split(r"[,\s]+", text) if name}


def _names_of(point: EntryPoint) -> set[str]:
    """What a plugin can be blocked by."""
    return {point.name, origin(point)[0]}


def _check_requirement(point: EntryPoint) -> None:
    """Raise unless this is a nanoflow that the plugin's package asks for, by the name that it is installed by.

    pip sees to that when it installs the package, but either may have been changed since. It is asked before the
    plugin is imported, since one for another version may fail at anything.
    """
    for line in getattr(point.dist, "requires", None) or ():
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            continue
        name = canonicalize_name(needed.name)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        if name == PROJECT:
            raise PluginError(
                f"its package requires {PROJECT!r}, which is another project on the package index; require "
                f"{DISTRIBUTION!r} instead"
            )
        if name == DISTRIBUTION and not needed.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"it is made for {DISTRIBUTION}{needed.specifier}, and this is {__version__}; install versions of the "
                "two that fit"
            )


def _hooks_of(plugin: Any, manager: pluggy.PluginManager, known: list[str]) -> Iterator[str]:
    """The hooks that a plugin implements.

    Raises:
        PluginError: one is misspelt or takes arguments; pluggy says less clearly what is wrong.
    """
    for name in dir(plugin):
        if (options := manager.parse_hookimpl_opts(plugin, name)) is None:
            continue
        hook = options.get("specname") or name
        if hook not in known and not options.get("optionalhook"):
            raise PluginError(f"there is no hook {hook!r}; there are: {', '.join(known)}.{did_you_mean(hook, known)}")
        parameters = inspect.signature(getattr(plugin, name)).parameters.values()
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if needed:
            raise PluginError(f"hook {hook} takes no arguments, but is defined as {name}({', '.join(needed)})")
        yield hook


def _check_component(role: Role, component: Any) -> None:
    if not isinstance(component, Component):
        raise TypeError(f"hook {role.hook} returned a list with a {type(component).__name__}, not a Component")
    if not isinstance(component.name, str) or NAME.fullmatch(component.name) is None:
        raise PluginError(
            f"a component of hook {role.hook} is called {shown(component.name):.60}; a name begins with a letter, and "
            "letters, digits, '_', '-' and '.' may follow"
        )
    if not dataclasses.is_dataclass(component.config):
        raise TypeError(f"the config of {role.name}={component.name} is not a dataclass")
    if not issubclass(component.config, role.options):
        raise TypeError(f"the config of {role.name}={component.name} does not derive from {role.options.__name__}")
    component.config()  # every option needs a default, so that a name alone is enough to choose a plugin
