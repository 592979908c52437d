"""A value for a key: brought to its type and checked, and the sentence for one that can't be right."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.fields import field_names


def checked(schema: type, values: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `schema` with `values` set; `prefix` names its place in error messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of its range.
    """
    names = field_names(schema)
    refuse_unknown(values, prefix, names, [prefix + name for name in names])
    values = in_types(schema, values, prefix)
    try:
        return schema(**values)
    except ConfigError as error:
        raise (error if str(error).startswith(prefix) else ConfigError(f"{prefix}{error}")) from None


def refuse_unknown(values: dict[str, Any], prefix: str, names: list[str], known: list[str]) -> None:
    """Raise for the first of `values` that is none of `names`; `known` are all keys that may have been meant."""
    for name in values:
        if name not in names:
            raise ConfigError(unknown_key(f"{prefix}{name}", known))


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


def in_types(schema: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`values` in the types that `schema` declares, such as 1 as 1.0 for a float; unknown keys are passed on.

    Raises:
        ConfigError: a value that can't be of its type.
    """
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
