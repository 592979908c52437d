"""The settings of a command: dataclasses, made of a composed config whose every value is checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from nanoflow.cli.settings.checks import checked, in_types, refuse_unknown
from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT, Choice, Config, PluginChoice
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import field_names, option
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.registry.choices import split_choices
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import in_config

PLUGINS = "plugins"  # the field with what serves each role, whose keys are the roles
T = TypeVar("T", bound="Settings")


@dataclass(frozen=True)
class Settings(Config):
    """All settings of a command: of the engine that it builds, how to sample, and those that a subclass adds.

    A field whose default is made by a dataclass is a section of keys, `plugins` has a key for each role that configs
    choose plugins for, and the others are keys themselves.
    """

    checkpoint: str = option(BUNDLED_CHECKPOINT, "a folder or a Hub id; bard is the one that nanoflow ships")
    plugins: dict[str, Any] = field(default_factory=dict)  # in a type that OmegaConf knows
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @classmethod
    def from_values(cls: type[T], values: dict[str, Any], registry: Registry) -> T:
        """Check everything in a composed config.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or out of its range.
            PluginError: an unknown plugin.
        """
        values = dict(values)
        refuse_unknown(values, "", keys(registry, cls), all_keys(registry, cls))
        for name, section in sections(cls).items():
            if name in values:
                values[name] = checked(section, _mapping(values[name], name), f"{name}.")
        written = {role: values.pop(role) for role in in_config(registry.roles) if role in values}
        values[PLUGINS] = {role: _chosen(role, value, registry) for role, value in written.items()}
        plain = {key: value for key, value in values.items() if key not in (*sections(cls), PLUGINS)}
        return cls(**{**values, **in_types(cls, plain, "")})

    @property
    def build(self) -> Config:
        """The part of it that an engine is built from."""
        return Config(**{name: getattr(self, name) for name in field_names(Config)})


def ordered_names(schema: type[Settings]) -> list[str]:
    """The names of its fields but `plugins`: the checkpoint, then what only this command has, then what all have."""
    checkpoint, *shared = (name for name in field_names(Config) if name != PLUGINS)
    own = [name for name in field_names(schema) if name not in field_names(Settings)]
    return [checkpoint, *own, "sampling", *shared]


def sections(schema: type[Settings]) -> dict[str, type]:
    """The sections of `schema` by name, each with its dataclass."""
    made_by = {item.name: item.default_factory for item in fields(schema)}
    return {name: made_by[name] for name in ordered_names(schema) if is_dataclass(made_by[name])}


def keys(registry: Registry, schema: type[Settings]) -> list[str]:
    """Its keys at the top: the names of its fields, and the roles."""
    return [*ordered_names(schema), *in_config(registry.roles)]


def all_keys(registry: Registry, schema: type[Settings]) -> list[str]:
    """Every key of a command, those of installed plugins included."""
    nested = [f"{section}.{name}" for section, part in sections(schema).items() for name in field_names(part)]
    for role in in_config(registry.roles, "one"):
        nested += [f"{role}.{name}" for entry in registry.entries(role) for name in field_names(entry.component.config)]
    return [*keys(registry, schema), *nested]


def _chosen(role: str, value: Any, registry: Registry) -> Choice:
    """What serves a role, from its value in a composed config."""
    if registry.roles[role].cardinality == "one":
        return _choice(role, _mapping(value, role), registry)
    items = split_choices(role, value)
    return tuple(_choice(role, {"name": name, **options}, registry) for name, options in items)


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
