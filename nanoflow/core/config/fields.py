"""Building blocks of option dataclasses: a field with a help line, and checks that name the option."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, field, fields
from functools import wraps
from typing import Any, TypeVar

from nanoflow.core.config.errors import ConfigError, did_you_mean, shown

Options = TypeVar("Options")
SIMPLE = frozenset((int, float, bool, str, type(None)))


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that `--help` prints for it."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `ConfigError` naming the option, its value and what would be right, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {shown(value)}.")


def checks_keywords(not_here: Mapping[str, str]) -> Callable[[type[Options]], type[Options]]:
    """Makes a frozen dataclass say in one sentence that it has no such field, or can't be changed.

    Args:
        not_here: fields that others have by these names, and what to do here instead.

    Raises:
        ConfigError: from the class, for a keyword that is no field.
        FrozenInstanceError: from its instances, when a field is set.
    """

    def decorate(cls: type[Options]) -> type[Options]:
        fill = cls.__init__

        @wraps(fill)
        def __init__(self: Options, *values: Any, **named: Any) -> None:
            try:
                fill(self, *values, **named)
            except TypeError:
                _check_names(cls, named, not_here)
                raise

        def __setattr__(self: Options, name: str, value: object) -> None:
            raise FrozenInstanceError(
                f"A {cls.__name__} can't be changed; make another by "
                f"{'params.clone(' if hasattr(cls, 'clone') else 'dataclasses.replace(params, '}{name}={shown(value)})."
            )

        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__setattr__ = __setattr__  # type: ignore[assignment]
        return cls

    return decorate


def _check_names(cls: type, named: Mapping[str, Any], not_here: Mapping[str, str]) -> None:
    known = field_names(cls)
    for name in named:
        if name in not_here:
            raise ConfigError(f"{cls.__name__}() has no {name}, which is not supported; {not_here[name]}.")
        if name not in known:
            raise ConfigError(f"{cls.__name__}() has no field {name!r}.{did_you_mean(name, known)}")


def make_plain(options: object) -> None:
    """Replace numbers and arrays of NumPy, PyTorch and others, in the fields of a dataclass, by Python's own."""
    for name in field_names(type(options)):
        value = getattr(options, name)
        if type(value) not in SIMPLE and (changed := plain(value)) is not value:
            object.__setattr__(options, name, changed)


def plain(value: Any) -> Any:
    """A value without numbers and arrays of NumPy and PyTorch, in lists and maps too; else the value itself."""
    if type(value) in SIMPLE:
        return value
    if isinstance(value, list | tuple):
        if SIMPLE.issuperset(map(type, value)):
            return value
        return type(value)(map(_plain_item, value)) if type(value) in (list, tuple) else value
    if type(value) is dict:
        if SIMPLE.issuperset(map(type, value)) and SIMPLE.issuperset(map(type, value.values())):
            return value
        return {_plain_item(key): _plain_item(item) for key, item in value.items()}
    return _plain_item(value)


def _plain_item(value: Any) -> Any:
    if type(value) in SIMPLE or not callable(getattr(type(value), "tolist", None)):
        return value
    try:
        return value.tolist()
    except Exception:  # a sparse tensor, or one without values
        return value


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
