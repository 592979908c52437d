"""From a name in a config to a plugin: load plugins, resolve names, explain failures. It names no plugin itself.

Built-in plugins (the packages in `nanoflow.plugins`) and third-party ones (entry points in the group `nanoflow`) come
in through the same hooks. A broken third-party plugin is reported and left out, so that it can't take the host down.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import pkgutil
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

from nanoflow.core.config.engine_config import ROLES, PluginChoice, SchedulerConfig
from nanoflow.core.config.errors import ConfigError, NanoflowError, PluginError, did_you_mean
from nanoflow.core.config.fields import field_names
from nanoflow.core.config.version import __version__
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.model import ModelArch
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.registry import hookspecs
from nanoflow.core.registry.component import Component

HOOKS = dict(zip(ROLES, ("nanoflow_models", "nanoflow_attention_backends", "nanoflow_schedulers",
                         "nanoflow_block_managers"), strict=True))  # fmt: skip
PRODUCTS = dict(zip(ROLES, (ModelArch, AttentionBackend, Scheduler, BlockManager), strict=True))
AUTO = "auto"
BLOCK = "NANOFLOW_BLOCK"  # environment variable: names of plugins to leave alone, with commas between them


class EntryPoint(Protocol):
    """The part of `importlib.metadata.EntryPoint` that the registry uses."""

    name: str
    dist: Any

    def load(self) -> Any:
        """Import what the entry point names."""


@dataclass(frozen=True)
class Entry:
    """An installed plugin component and the package that brought it."""

    role: str
    component: Component
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.role}={self.component.name} from {self.package} {self.version}"

    def build(self, config: Any, context: Any) -> Any:
        """The object that serves the role.

        Raises:
            NanoflowError: the plugin's own.
            PluginError: the plugin fails, or makes something else; the message names it, and where it failed.
        """
        try:
            built = self.component.build(config, context)
        except NanoflowError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).parent.name}/{Path(place.filename).name}:{place.lineno}"
            raise PluginError(
                f"{self} could not be built: {_why(error)} (at {where}); --debug shows the traceback."
            ) from error
        if not isinstance(built, PRODUCTS[self.role]):
            raise PluginError(
                f"{self} built a {type(built).__name__}, which is no {PRODUCTS[self.role].__name__}; "
                f"what serves the role {self.role} must derive from that."
            )
        return built


class Registry:
    """All installed plugins. Make one with `Registry.load()`; it is never changed afterwards.

    Attributes:
        problems: one sentence for each plugin that could not be loaded.
        config_packages: packages whose folders mirror `conf/`, in the order of entry points, and what distribution
            each is of.
        blocked: plugins that were left alone on request, such as `theirs of their-package 1.2`.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        config_packages: dict[str, str],
        problems: list[str],
        blocked: Iterable[str] = (),
    ) -> None:
        self.config_packages = config_packages
        self.problems = problems
        self.blocked = list(blocked)
        self._entries: dict[str, dict[str, Entry]] = {role: {} for role in ROLES}
        for entry in entries:
            if twin := self._entries[entry.role].get(entry.component.name):
                raise PluginError(
                    f"Two plugins are called {entry.role}={entry.component.name}: one from {twin.package} "
                    f"{twin.version}, one from {entry.package} {entry.version}; uninstall or rename one of them, or "
                    f"leave one out with --block {entry.package}."
                )
            self._entries[entry.role][entry.component.name] = entry

    @classmethod
    def load(
        cls, *, strict: bool = False, extra: Iterable[EntryPoint] | None = None, blocked: Iterable[str] | None = None
    ) -> Registry:
        """Load built-in plugins and those of installed packages.

        Args:
            strict: raise the first problem instead of going on without the plugin.
            extra: entry points to use in place of the installed ones.
            blocked: names of entry points or packages that are not even imported; if None, those in the environment
                variable NANOFLOW_BLOCK.

        Raises:
            PluginError: two plugins of one role share a name; or, if `strict`, a plugin can't be loaded.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        sources: dict[str, tuple[str, str, str]] = {}
        problems: list[str] = []
        for name in _builtin_packages():
            manager.register(import_module(name), name)
            sources[name] = (name, hookspecs.PROJECT, __version__)
        points = list(entry_points(group=hookspecs.PROJECT) if extra is None else extra)
        names = _names(os.environ.get(BLOCK, "")) if blocked is None else set(blocked)
        kept, left_alone = [], []
        for point in points:
            (left_alone if names & _names_of(point) else kept).append(point)
        known = set().union(*map(_names_of, points))
        for name in sorted(names - known):
            problems.append(
                f"There is no plugin {name!r} to block; installed are: {', '.join(sorted(known)) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
        for point in kept:
            package, version = _origin(point)
            key = f"{package}:{point.name}"  # two packages may name their entry points alike
            try:
                _check_requirement(point)
                plugin = point.load()
                _check_hooks(manager, plugin)
                manager.register(plugin, key)
            except Exception as error:
                problem = f"Plugin {point.name!r} of {package} {version} was left out: {_why(error)}"
                if strict:
                    raise PluginError(problem) from error
                problems.append(problem)
            else:
                sources[key] = (point.name, package, version)
        entries: list[Entry] = []
        packages: dict[str, str] = {}
        for key, (name, package, version) in sources.items():
            try:
                found = list(_components(manager, key))
                folders = list(_config_packages(manager, key))
            except Exception as error:
                problem = f"Plugin {name!r} of {package} {version} was left out: {_why(error)}"
                if strict:
                    raise PluginError(problem) from error
                problems.append(problem)
                continue
            entries += [Entry(role, component, package, version) for role, component in found]
            packages |= dict.fromkeys(folders, package)
        return cls(entries, packages, problems, [" ".join((p.name, "of", *_origin(p))) for p in left_alone])

    def entries(self, role: str) -> list[Entry]:
        """The role's plugins by falling priority, then name."""
        return sorted(self._entries[role].values(), key=lambda e: (-e.component.priority, e.component.name))

    def get(self, role: str, name: str) -> Entry:
        """The plugin of that name.

        Raises:
            PluginError: there is none; the message lists what there is.
        """
        entry = self._entries[role].get(name) if isinstance(name, str) else None
        if entry is None:
            known = sorted(self._entries[role])
            raise PluginError(
                f"There is no {role} called {name!r}; installed are: {', '.join(known) or 'none'}."
                f"{did_you_mean(str(name), known)}{self._blocked_hint()}"
            )
        return entry

    def _blocked_hint(self) -> str:
        return f" Blocked: {', '.join(self.blocked)}." if self.blocked else ""

    def options(self, entry: Entry, options: dict[str, Any]) -> Any:
        """An instance of the plugin's config dataclass with `options` set.

        Raises:
            ConfigError: an option that the plugin doesn't have, or a value that it refuses.
        """
        known = field_names(entry.component.config)
        for name in options:
            if name not in known:
                has = f"it has: {', '.join(known)}" if known else "it has no options"
                raise ConfigError(
                    f"{entry.role}={entry.component.name} has no option {name!r}; {has}.{did_you_mean(name, known)}"
                )
        return entry.component.config(**options)

    def resolve(self, role: str, choice: PluginChoice, context: Any = None) -> tuple[Entry, Any]:
        """The plugin for `choice`, which can serve `context` if there is one, and its config.

        `auto` takes the one of the highest priority that is available and supports the context. For models, whose
        architecture is a question of its own, see `model_for`.

        Raises:
            PluginError: unknown name, or it can't serve here, with the reason.
            ConfigError: options that it doesn't have.
        """
        if choice.name != AUTO:
            entry = self.get(role, choice.name)
            config = self.options(entry, choice.options)
            if reason := _why_not(entry.component, config, context):
                raise PluginError(f"{role}={choice.name} can't be used here: {reason}")
            return entry, config
        if choice.options:
            raise ConfigError(f"{role}=auto takes no options; name the {role} that {', '.join(choice.options)} is for.")
        reasons = []
        for entry in self.entries(role):
            config = entry.component.config()
            if entry.component.priority < 0:
                continue
            reason = _why_not(entry.component, config, context)
            if reason is None:
                return entry, config
            reasons.append(f"{entry.component.name}: {reason}")
        raise PluginError(f"No {role} can serve here. {' '.join(reasons)}")

    def model_for(self, choice: PluginChoice, architectures: list[str]) -> tuple[Entry, Any]:
        """The model plugin for a checkpoint of these Hugging Face `architectures`, and its config.

        Raises:
            PluginError: no plugin, or not the chosen one, serves any of them.
            ConfigError: options that it doesn't have.
        """
        serving = [e for e in self.entries("model") if set(e.component.architectures) & set(architectures)]
        wanted = ", ".join(architectures) or "no named architecture"
        if choice.name == AUTO:
            if not serving:
                known = sorted({a for e in self.entries("model") for a in e.component.architectures})
                raise PluginError(f"No model plugin serves this checkpoint ({wanted}); served are: {', '.join(known)}.")
            choice = PluginChoice(serving[0].component.name, choice.options)
        entry = self.get("model", choice.name)
        if entry not in serving:
            raise PluginError(
                f"model={choice.name} serves {', '.join(entry.component.architectures)}, but the checkpoint is of "
                f"{wanted}; use model=auto{' or model=' + serving[0].component.name if serving else ''}."
            )
        if reason := entry.component.available():
            raise PluginError(f"model={choice.name} can't be used here: {reason}")
        return entry, self.options(entry, choice.options)


def _why_not(component: Component, config: Any, context: Any) -> str | None:
    return component.available() or (component.supports(config, context) if context is not None else None)


def _builtin_packages() -> list[str]:
    package = import_module("nanoflow.plugins")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__, "nanoflow.plugins."))


def _call(manager: pluggy.PluginManager, hook: str, plugin: str) -> list[Any]:
    """What one plugin returns from one hook; plugins are asked one by one, so that each answer has an author."""
    results = []
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        if implementation.plugin_name == plugin:
            answer = implementation.function()
            if not isinstance(answer, list | tuple):
                raise TypeError(f"hook {hook} returned {type(answer).__name__}, not a list")
            results += answer
    return results


def _components(manager: pluggy.PluginManager, plugin: str) -> Iterator[tuple[str, Component]]:
    for role, hook in HOOKS.items():
        for component in _call(manager, hook, plugin):
            if not isinstance(component, Component):
                raise TypeError(f"hook {hook} returned a list with a {type(component).__name__}, not a Component")
            if not dataclasses.is_dataclass(component.config):
                raise TypeError(f"the config of {role}={component.name} is not a dataclass")
            if role == "scheduler" and not issubclass(component.config, SchedulerConfig):
                raise TypeError(f"the config of scheduler={component.name} does not derive from SchedulerConfig")
            component.config()  # every option needs a default, so that a name alone is enough to choose a plugin
            yield role, component


def _config_packages(manager: pluggy.PluginManager, plugin: str) -> Iterator[str]:
    for package in _call(manager, "nanoflow_config_packages", plugin):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"there is no package {package!r} for hook nanoflow_config_packages")
        yield package


def _origin(point: EntryPoint) -> tuple[str, str]:
    """The name and the version of the package that an entry point comes from."""
    return (point.dist.name, point.dist.version) if point.dist else ("unknown package", "?")


def _names(text: str) -> set[str]:
    return {name for name in re.split(r"[,\s]+", text) if name}


def _names_of(point: EntryPoint) -> set[str]:
    """What a plugin can be blocked by."""
    return {point.name, _origin(point)[0]}


def _check_requirement(point: EntryPoint) -> None:
    """Raise unless this is a nanoflow that the plugin's package asks for.

    pip sees to that when it installs the package, but either may have been changed since. It is asked before the
    plugin is imported, since one for another version may fail at anything.
    """
    for line in getattr(point.dist, "requires", None) or ():
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            continue
        if needed.name.lower() != hookspecs.PROJECT or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        if not needed.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"it is made for nanoflow{needed.specifier}, and this is {__version__}; install versions of the two "
                "that fit"
            )


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Raise if one of the plugin's hooks is misspelt or takes arguments; pluggy says less clearly what is wrong."""
    known = [*HOOKS.values(), "nanoflow_config_packages"]
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


def _why(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else "no message"
    return text if isinstance(error, NanoflowError) else f"{type(error).__name__}: {text}"
