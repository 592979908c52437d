"""The settings of a command: dataclasses, made of a composed config whose every value is checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from nanoflow.cli.settings.checks import checked, in_types, refuse_unknown
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT, ROLES, Config, PluginChoice
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import field_names, option
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.registry.registry import AUTO, Registry

T = TypeVar("T", bound="Settings")


@dataclass(frozen=True)
class Settings(Config):
    """All settings of a command: of the engine that it builds, how to sample, and those that a subclass adds.

    A field whose default is made by a dataclass is a section of keys, one of a role chooses a plugin, and the others
    are keys themselves.
    """

    checkpoint: str = option(BUNDLED_CHECKPOINT, "a folder or a Hub id; bard is the one that nanoflow ships")
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @classmethod
    def from_values(cls: type[T], values: dict[str, Any], registry: Registry) -> T:
        """Check everything in a composed config.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or out of its range.
            PluginError: an unknown plugin.
        """
        values = dict(values)
        refuse_unknown(values, "", field_names(cls), all_keys(registry, cls))
        for name, section in sections(cls).items():
            if name in values:
                values[name] = checked(section, _mapping(values[name], name), f"{name}.")
        for role in ROLES:
            if role in values:
                values[role] = _choice(role, _mapping(values[role], role), registry)
        plain = {key: value for key, value in values.items() if key not in sections(cls) and key not in ROLES}
        return cls(**{**values, **in_types(cls, plain, "")})

    @property
    def build(self) -> Config:
        """The part of it that an engine is built from."""
        return Config(**{name: getattr(self, name) for name in field_names(Config)})


def ordered_names(schema: type[Settings]) -> list[str]:
    """The names of its fields: the checkpoint, then what only this command has, then what all have."""
    checkpoint, *shared = field_names(Config)
    own = [name for name in field_names(schema) if name not in field_names(Settings)]
    return [checkpoint, *own, "sampling", *shared]


def sections(schema: type[Settings]) -> dict[str, type]:
    """The sections of `schema` by name, each with its dataclass."""
    made_by = {item.name: item.default_factory for item in fields(schema)}
    return {name: made_by[name] for name in ordered_names(schema) if is_dataclass(made_by[name])}


def all_keys(registry: Registry, schema: type[Settings]) -> list[str]:
    """Every key of a command, those of installed plugins included."""
    keys = [f"{section}.{name}" for section, part in sections(schema).items() for name in field_names(part)]
    for role in ROLES:
        keys += [f"{role}.{name}" for entry in registry.entries(role) for name in field_names(entry.component.config)]
    return [*ordered_names(schema), *keys]


def _choice(role: str, values: dict[str, Any], registry: Registry) -> PluginChoice:
    options = dict(values)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{role}.name must be the name of a plugin, got {name!r}.")
    if name != AUTO:
        entry = registry.get(role, name)
        options = in_types(entry.component.config, options, f"{role}.")
        registry.options(entry, options)
    return PluginChoice(name, options)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} holds options, such as {key}.NAME=VALUE, and can't be {value!r} itself.")
    return value
