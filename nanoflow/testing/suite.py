"""What all suites share: from a subclass's attributes to the plugin under test and the plugins around it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.registry.component import Component, Entry
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES


class Suite:
    """Attributes to set in a subclass.

    Attributes:
        component: the plugin under test: its registered name, or the `Component` itself.
        options: values for fields of its config dataclass; what is absent keeps its default.
    """

    role: ClassVar[str]
    component: ClassVar[Component | str]
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def registry(cls) -> Registry:
        """All installed plugins if the one under test is given by name, else the built-in ones and it."""
        component = getattr(cls, "component", None)
        assert component is not None, f"{cls.__name__} needs an attribute `component`: a plugin's name, or a Component"
        if isinstance(component, str):
            return Registry.load()
        known = Registry.load(extra=[])
        others = [entry for role in ROLES for entry in known.entries(role)]
        tested = Entry(ROLES[cls.role], component, cls.__module__, "under test")
        return Registry([*others, tested], known.config_packages, [])

    @classmethod
    def choice(cls) -> PluginChoice:
        """The plugin under test, as an engine's config names it."""
        name = cls.component if isinstance(cls.component, str) else cls.component.name
        return PluginChoice(name, dict(cls.options))

    @classmethod
    def plugin(cls) -> tuple[Component, Any]:
        """The plugin under test and its config; skips the test where it is not available."""
        registry, choice = cls.registry(), cls.choice()
        entry = registry.get(cls.role, choice.name)
        if reason := entry.component.available():
            pytest.skip(reason)
        return entry.component, registry.options(entry, choice.options)
