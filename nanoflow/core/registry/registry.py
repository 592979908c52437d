"""From a name in a config to a plugin: resolve names, explain failures. It names no plugin itself.

Built-in plugins (the packages in `nanoflow.plugins`) and third-party ones (entry points in the group `nanoflow`) come
in through the same hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nanoflow.core.config.engine_config import Choice, PluginChoice
from nanoflow.core.config.errors import ConfigError, NanoflowError, PluginError, did_you_mean, shown
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.by_request import ByRequest
from nanoflow.core.registry.component import Entry
from nanoflow.core.registry.contract import CONTRACT, Contract
from nanoflow.core.registry.discovery import Discovery, EntryPoint
from nanoflow.core.registry.roles import ROLES, Roles

AUTO = "auto"


class Registry:
    """All installed plugins. Make one with `Registry.load()`; it is never changed afterwards.

    Attributes:
        roles: the table of roles.
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
        roles: Roles = ROLES,
    ) -> None:
        self.roles = roles
        self.config_packages = config_packages
        self.problems = problems
        self.blocked = list(blocked)
        self._entries: dict[str, dict[str, Entry]] = {role: {} for role in roles}
        for entry in entries:
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        role, name = entry.role.name, entry.component.name
        if twin := self._entries[role].get(name):
            raise PluginError(
                f"Two plugins are called {role}={name}: one from {twin.package} {twin.version}, one from "
                f"{entry.package} {entry.version}; uninstall or rename one of them, or leave one out with --block "
                f"{entry.package}."
            )
        self._entries[role][name] = entry

    @classmethod
    def load(
        cls,
        *,
        strict: bool = False,
        extra: Iterable[EntryPoint] | None = None,
        blocked: Iterable[str] | None = None,
        roles: Roles = ROLES,
        contract: Contract = CONTRACT,
    ) -> Registry:
        """Load built-in plugins and those of installed packages.

        Args:
            strict: raise the first problem instead of going on without the plugin.
            extra: entry points to use in place of the installed ones.
            blocked: names of entry points or packages that are not even imported; if None, those in the environment
                variable NANOFLOW_BLOCK.
            roles: the table of roles.
            contract: the version of the contract, and what each version changed.

        Raises:
            PluginError: two plugins of one role share a name; or, if `strict`, a plugin can't be loaded.
        """
        found = Discovery(roles, contract, strict).run(extra, blocked)
        return cls(found.entries, found.config_packages, found.problems, found.blocked, roles)

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
            hint = did_you_mean(name, known) if isinstance(name, str) else ""
            raise PluginError(
                f"There is no {self.roles[role].noun} called {shown(name)}; "
                f"installed are: {', '.join(known) or 'none'}.{hint}{self._blocked_hint()}"
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
                    f"{entry.role.name}={entry.component.name} has no option {name!r}; {has}."
                    f"{did_you_mean(name, known)}"
                )
        return entry.component.config(**options)

    def resolve(self, role: str, choice: Choice | None = None, context: Any = None) -> tuple[Entry, Any]:
        """The plugin for `choice`, which can serve `context` if there is one, and its config.

        `auto` takes the one of the highest priority that is available and supports the context. For models, whose
        architecture is a question of its own, see `model_for`.

        Args:
            role: one that a single plugin serves.
            choice: None for the role's default.
            context: the role's; None to ask only whether the plugin is available.

        Raises:
            PluginError: unknown name, or it can't serve here, with the reason.
            ConfigError: options that it doesn't have.
        """
        choice = self.roles[role].default_choice if choice is None else choice
        assert isinstance(choice, PluginChoice), f"several plugins serve {role}; see `build_several`"
        if choice.name != AUTO:
            return self._named(role, choice, context)
        if choice.options:
            raise ConfigError(f"{role}=auto takes no options; name the {role} that {', '.join(choice.options)} is for.")
        reasons = []
        for entry in self.entries(role):
            if entry.component.priority < 0:
                continue
            config = entry.component.config()
            reason = entry.component.why_not(config, context)
            if reason is None:
                return entry, config
            reasons.append(f"{entry.component.name}: {reason}")
        raise PluginError(f"No {role} can serve here. {' '.join(reasons)}")

    def _named(self, role: str, choice: PluginChoice, context: Any) -> tuple[Entry, Any]:
        entry = self.get(role, choice.name)
        config = self.options(entry, choice.options)
        if reason := entry.component.why_not(config, context):
            raise PluginError(f"{role}={choice.name} can't be used here: {reason}")
        return entry, config

    def model_for(self, choice: Choice | None, architectures: list[str]) -> tuple[Entry, Any]:
        """The model plugin for a checkpoint of these Hugging Face `architectures`, and its config.

        Raises:
            PluginError: no plugin, or not the chosen one, serves any of them.
            ConfigError: options that it doesn't have.
        """
        choice = self.roles["model"].default_choice if choice is None else choice
        assert isinstance(choice, PluginChoice)
        serving = [e for e in self.entries("model") if set(e.component.architectures) & set(architectures)]
        wanted = ", ".join(architectures) or "no named architecture"
        if choice.name == AUTO:
            if not serving:
                known = sorted({a for e in self.entries("model") for a in e.component.architectures})
                raise PluginError(
                    f"No model plugin serves this checkpoint ({wanted:.200}); served are: {', '.join(known)}, and a "
                    "plugin of your own can serve more: nanoflow plugins new NAME --role model."
                )
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

    def build_several(self, role: str, choices: Choice | None, context: Any) -> list[Any]:
        """The objects that serve a role of cardinality `several`, in the order of `choices` (None: the default).

        Raises:
            NanoflowError: as `resolve` and `Entry.build` do.
        """
        choices = self.roles[role].default_choice if choices is None else choices
        assert isinstance(choices, tuple), f"one plugin serves {role}; see `resolve`"
        resolved = [self._named(role, choice, context) for choice in choices]
        return [entry.build(config, context) for entry, config in resolved]

    def build_by_request(self, role: str, context: Any) -> ByRequest:
        """All plugins of a role of cardinality `by_request`, built with their default options.

        One that can't be used here, or fails, harms only the requests that ask for it.
        """
        products: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for entry in self.entries(role):
            name = entry.component.name
            try:
                config = entry.component.config()
                if reason := entry.component.why_not(config, context):
                    reasons[name] = f"{role}={name} can't be used here: {reason}"
                else:
                    products[name] = entry.build(config, context)
            except NanoflowError as error:
                reasons[name] = str(error)
        return ByRequest(self.roles[role].noun, products, reasons)
