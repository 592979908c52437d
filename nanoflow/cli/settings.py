"""Settings of commands: from a composed config to checked dataclasses, and the sentence for what can't be right."""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from nanoflow.core.config.engine_config import BUNDLED_CHECKPOINT, Choice, Config, EngineConfig, PluginChoice
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import field_names, option
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.registry.choices import split_choices
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import in_config

PLUGINS = "plugins"  # the field with what serves each role, whose keys are the roles
T = TypeVar("T", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """All settings of a command: these, of the engine that it builds, and those that a subclass adds.

    A field whose default is made by a dataclass is a section of keys, `plugins` has a key for each role that configs
    choose plugins for, and the others are keys themselves.
    """

    checkpoint: str = option(BUNDLED_CHECKPOINT, "a folder or a Hub id; bard is the one that nanoflow ships")
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    plugins: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_composed(cls: type[T], composed: DictConfig, registry: Registry) -> T:
        """Check everything in a config that Hydra composed.

        Raises:
            ConfigError: an unknown key, a value of the wrong type or out of its range.
            PluginError: an unknown plugin.
        """
        try:
            values = OmegaConf.to_container(composed, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key} can't be resolved: {str(error).splitlines()[0]}.") from error
        _refuse_unknown(values, "", keys(registry, cls), all_keys(registry, cls))
        for name, section in sections(cls).items():
            if name in values:
                values[name] = checked(section, _mapping(values[name], name), f"{name}.")
        written = {role: values.pop(role) for role in in_config(registry.roles) if role in values}
        values[PLUGINS] = {role: _chosen(role, value, registry) for role, value in written.items()}
        plain = {key: value for key, value in values.items() if key not in (*sections(cls), PLUGINS)}
        return cls(**{**values, **_coerced(cls, plain, "")})

    @property
    def build(self) -> Config:
        """The part of it that an engine is built from."""
        return Config(**{name: getattr(self, name) for name in field_names(Config)})


def ordered_names(schema: type[Settings]) -> list[str]:
    """The names of its fields but `plugins`: the checkpoint, then what only this command has, then what all have."""
    _, *shared = field_names(Settings)
    return sorted((name for name in field_names(schema) if name != PLUGINS), key=shared.__contains__)


def keys(registry: Registry, schema: type[Settings]) -> list[str]:
    """Its keys at the top: the names of its fields, and the roles."""
    return [*ordered_names(schema), *in_config(registry.roles)]


def sections(schema: type[Settings]) -> dict[str, type]:
    """The sections of `schema` by name, each with its dataclass."""
    made_by = {item.name: item.default_factory for item in fields(schema)}
    return {name: made_by[name] for name in ordered_names(schema) if is_dataclass(made_by[name])}


@dataclass(frozen=True)
class RunConfig(Settings):
    """What `run` builds, and what it does with it."""

    prompts: list[str] = option([], "texts to complete")
    prompts_file: str | None = option(
        None, "prompts from a file: a line each, or .jsonl objects; - is standard input; replaces prompts"
    )
    output: str | None = option(
        None, "JSON lines file for the completions, continued if it is there; a sweep puts it into each job's folder"
    )


SECTIONS = sections(RunConfig)


def checked(schema: type, values: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `schema` with `values` set; `prefix` names its place in error messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of its range.
    """
    names = field_names(schema)
    _refuse_unknown(values, prefix, names, [prefix + name for name in names])
    coerced = _coerced(schema, values, prefix)
    try:
        return schema(**coerced)
    except ConfigError as error:
        raise (error if str(error).startswith(prefix) else ConfigError(f"{prefix}{error}")) from None


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
        options = _coerced(entry.component.config, options, f"{role}.")
        registry.options(entry, options)
    return PluginChoice(name, options)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} holds options, such as {key}.NAME=VALUE, and can't be {value!r} itself.")
    return value


def _refuse_unknown(values: dict[str, Any], prefix: str, names: list[str], known: list[str]) -> None:
    for name in values:
        if name not in names:
            raise ConfigError(unknown_key(f"{prefix}{name}", known))


def all_keys(registry: Registry, schema: type[Settings] = RunConfig) -> list[str]:
    """Every key of a command, those of installed plugins included."""
    nested = [f"{section}.{name}" for section, part in sections(schema).items() for name in field_names(part)]
    for role in in_config(registry.roles, "one"):
        nested += [f"{role}.{name}" for entry in registry.entries(role) for name in field_names(entry.component.config)]
    return [*keys(registry, schema), *nested]


def unknown_key(key: str, known: list[str]) -> str:
    """The sentence for a key that does not exist: the one that was probably meant, or those in the same place."""
    section, _, name = key.rpartition(".")
    here = [other for other in known if other.rpartition(".")[0] == section]
    if meant := _closest(name, here) or _closest(name, known):
        return f"There is no key {key!r}. Did you mean {meant!r}?"
    return f"There is no key {key!r}; there are: {', '.join(here or known)}."


def _closest(name: str, keys: list[str]) -> str | None:
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return next((by_name[match] for match in get_close_matches(name, by_name, n=1)), None)


def _coerced(schema: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`values` in the types that `schema` declares, such as 1 as 1.0 for a float; unknown keys are passed on."""
    try:
        node = OmegaConf.structured(schema)
    except ValidationError:  # declares types that OmegaConf can't express: the dataclass has to check them itself
        return values
    OmegaConf.set_readonly(node, False)
    hints = get_type_hints(schema)
    result = dict(values)
    for key in values.keys() & hints.keys():
        part = next((item for item in get_args(hints[key]) if is_dataclass(item)), None)
        if part is not None and isinstance(values[key], dict):
            result[key] = checked(part, values[key], f"{prefix}{key}.")
            continue
        if isinstance(values[key], dict) and dict in map(get_origin, (hints[key], *get_args(hints[key]))):
            continue  # OmegaConf refuses JSON's keys for integers; the dataclass checks maps itself
        try:
            node[key] = values[key]
        except OmegaConfBaseException as error:
            expected = _describe(hints[key])
            hint = f"; write {prefix}{key}=[...]" if expected.startswith("a list") else ""
            raise ConfigError(f"{prefix}{key} must be {expected}, got {values[key]!r}{hint}.") from error
        result[key] = OmegaConf.to_object(node[key]) if OmegaConf.is_config(node[key]) else node[key]
    return result


def _describe(hint: Any) -> str:
    """A type in words: `list[str] | None` is "a list of texts or null"."""
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(item) for item in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    if get_origin(hint) is list:
        return f"a list of {_describe(get_args(hint)[0]).split()[-1]}s"
    if is_dataclass(hint):
        return "a mapping of options"
    if get_origin(hint) is dict:
        return "a map"
    return names.get(hint, getattr(hint, "__name__", str(hint)))
