"""From the flat keywords of `LLM` and `AsyncLLM` to a whole config."""

from __future__ import annotations

from typing import Any

from nanoflow.core.config.engine_config import Choice, Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import ConfigError, did_you_mean
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.choices import named_choices
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import in_config


def config_from_options(
    registry: Registry, checkpoint: str | None, options: dict[str, Any], owner: str = "LLM"
) -> Config:
    """Sort flat keywords of `owner` into the engine's options and those of the chosen plugins.

    Where several plugins serve a role, their options stand beside their names: `observers=["a", {"name": "b", ...}]`.

    Raises:
        ConfigError: a keyword that neither the engine nor any chosen plugin knows.
        PluginError: an unknown plugin name.
    """
    options, roles = dict(options), registry.roles
    names = {role: options.pop(role, roles[role].default) for role in in_config(roles, "one")}
    several = {role: options.pop(role, list(roles[role].default)) for role in in_config(roles, "several")}
    homes: dict[str, dict[str, Any]] = {name: {} for name in ("engine", *names)}
    known = dict.fromkeys(field_names(EngineConfig), "engine")
    for role, name in names.items():
        if name != AUTO:
            for field in field_names(registry.get(role, name).component.config):
                known.setdefault(field, role)
    for name, value in options.items():
        if name not in known:
            everything = sorted([*known, *names, *several, "checkpoint"])
            raise ConfigError(
                f"{owner}() has no option {name!r}; it has: {', '.join(everything)}.{did_you_mean(name, everything)}"
            )
        homes[known[name]][name] = value
    plugins: dict[str, Choice] = {role: PluginChoice(name, homes[role]) for role, name in names.items()}
    plugins |= {role: named_choices(registry, role, value) for role, value in several.items()}
    default = Config().checkpoint
    return Config(default if checkpoint is None else str(checkpoint), EngineConfig(**homes["engine"]), plugins)
