"""From the flat keywords of `LLM` and `AsyncLLM` to a whole config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoflow.core.config.engine_config import ROLES, Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import ConfigError, did_you_mean
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.registry import AUTO, Registry


def config_from_options(
    registry: Registry, checkpoint: str | None, options: dict[str, Any], owner: str = "LLM"
) -> Config:
    """Sort flat keywords of `owner` into the engine's options and those of the chosen plugins.

    Raises:
        ConfigError: a keyword that neither the engine nor any chosen plugin knows.
        PluginError: an unknown plugin name.
    """
    options = dict(options)
    defaults = Config()
    choices = {role: PluginChoice(options.pop(role, getattr(defaults, role).name)) for role in ROLES}
    homes: dict[str, dict[str, Any]] = {name: {} for name in ("engine", *ROLES)}
    known = dict.fromkeys(field_names(EngineConfig), "engine")
    for role, choice in choices.items():
        if choice.name != AUTO:
            for name in field_names(registry.get(role, choice.name).component.config):
                known.setdefault(name, role)
    for name, value in options.items():
        if name not in known:
            everything = sorted([*known, *ROLES, "checkpoint"])
            raise ConfigError(
                f"{owner}() has no option {name!r}; it has: {', '.join(everything)}.{did_you_mean(name, everything)}"
            )
        homes[known[name]][name] = value
    return Config(
        checkpoint=defaults.checkpoint if checkpoint is None else str(checkpoint),
        engine=EngineConfig(**homes["engine"]),
        **{role: replace(choice, options=homes[role]) for role, choice in choices.items()},
    )
