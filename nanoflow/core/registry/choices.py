"""What a user writes for a role that several plugins serve: a list of names, with options beside some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.config.errors import ConfigError, shown
from nanoflow.core.registry.registry import Registry


def split_choices(role: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The name and the options of each plugin of `["a", {"name": "b", "size": 3}]`.

    Raises:
        ConfigError: it is not such a list.
    """
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{role} must be a list of plugins, got {shown(value)}; write {role}=[...].")
    return [_split(role, item) for item in value]


def named_choices(registry: Registry, role: str, value: Any) -> tuple[PluginChoice, ...]:
    """The choices of such a list.

    Raises:
        ConfigError: it is not such a list, or has options that a plugin doesn't have or refuses.
        PluginError: an unknown plugin.
    """
    choices = tuple(PluginChoice(name, options) for name, options in split_choices(role, value))
    for choice in choices:
        registry.options(registry.get(role, choice.name), choice.options)
    return choices


def _split(role: str, item: Any) -> tuple[str, dict[str, Any]]:
    options = dict(item) if isinstance(item, Mapping) else {"name": item}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"Each item of {role} must be the name of a plugin, or a mapping with its name and options, "
            f"got {shown(item)}."
        )
    return name, options
