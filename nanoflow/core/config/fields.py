"""Building blocks of option dataclasses: a field with a help line, and checks that name the option."""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Any

from nanoflow.core.config.errors import ConfigError, shown


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that `--help` prints for it."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `ConfigError` naming the option, its value and what would be right, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {shown(value)}.")


def is_int(value: object) -> bool:
    """Whether `value` is an integer; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number; NaN, infinities, integers that no float can hold and `True` are not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def list_of(value: object, accepts: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(accepts(item) for item in value))


def field_names(config: type) -> list[str]:
    """The names of a config dataclass's fields, in order."""
    return [f.name for f in fields(config)]
