"""From the flat keywords of `LLM` and `AsyncLLM` to a whole config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nanoflow.core.api.vllm_options import translated
from nanoflow.core.config.engine_config import Choice, Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import ConfigError, did_you_mean, shown
from nanoflow.core.config.fields import field_names
from nanoflow.core.registry.choices import named_choices
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import in_config

Name = str | os.PathLike[str]


def config_from_options(
    registry: Registry, checkpoint: Name | None, options: dict[str, Any], owner: str = "LLM"
) -> Config:
    """Sort flat keywords of `owner` into the engine's options and those of the chosen plugins.

    Where several plugins serve a role, their options stand beside their names: `observers=["a", {"name": "b", ...}]`.
    Names of vLLM and nano-vLLM are taken as `vllm_options` says.

    Raises:
        ConfigError: a keyword that neither the engine nor any chosen plugin knows, or that is not supported.
        PluginError: an unknown plugin name.
    """
    roles = registry.roles
    checkpoint, options = _checkpoint_in(registry, checkpoint, options, owner)
    options = translated(options, _homes_of_names(registry, options), owner)
    homes_of_names = _homes_of_names(registry, options)
    names = {role: options.pop(role, roles[role].default) for role in in_config(roles, "one")}
    several = {role: options.pop(role, list(roles[role].default)) for role in in_config(roles, "several")}
    homes: dict[str, dict[str, Any]] = {name: {} for name in ("engine", *names)}
    for name, value in options.items():
        if name not in homes_of_names:
            everything = sorted({*homes_of_names, "checkpoint"})
            raise ConfigError(
                f"{owner}() has no option {name!r}; it has: {', '.join(everything)}.{did_you_mean(name, everything)}"
            )
        homes[homes_of_names[name]][name] = value
    plugins: dict[str, Choice] = {role: PluginChoice(name, homes[role]) for role, name in names.items()}
    plugins |= {role: named_choices(registry, role, value) for role, value in several.items()}
    default = Config().checkpoint
    return Config(default if checkpoint is None else str(checkpoint), EngineConfig(**homes["engine"]), plugins)


def _homes_of_names(registry: Registry, options: dict[str, Any]) -> dict[str, str]:
    """All names that mean something beside these options: `engine`, or the role whose plugin has such an option."""
    roles = registry.roles
    known = dict.fromkeys(field_names(EngineConfig), "engine")
    for role in in_config(roles, "one"):
        name = options.get(role, roles[role].default)
        if not (isinstance(name, str) and name == AUTO):
            for field in field_names(registry.get(role, name).component.config):
                known.setdefault(field, role)
    return known | {role: role for role in in_config(roles)}


def _checkpoint_in(
    registry: Registry, checkpoint: Name | None, options: dict[str, Any], owner: str
) -> tuple[Name | None, dict[str, Any]]:
    """The checkpoint, which may be what `model` names, as in vLLM, and the other options."""
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(f"{owner}(checkpoint=...) must be a folder or a Hub id, got {shown(checkpoint)}.")
    model = options.get("model")
    if not _is_checkpoint(registry, model):
        return checkpoint, options
    if checkpoint is not None:
        raise ConfigError(
            f"{owner}() got two checkpoints, {str(checkpoint)!r:.200} and model={str(model)!r:.200}; give one of them."
        )
    return model, {name: value for name, value in options.items() if name != "model"}


def _is_checkpoint(registry: Registry, model: Any) -> bool:
    """Whether a value of `model` is a folder or a Hub id rather than the name of a plugin."""
    if isinstance(model, os.PathLike):
        return True
    if (
        not isinstance(model, str)
        or model == ""
        or any(entry.component.name == model for entry in registry.entries("model"))
    ):
        return False
    try:
        return "/" in model or os.sep in model or Path(model).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or no text in valid Unicode
        return False
