"""The methods that a contract asks for, as code to fill in: for roles that have no template of their own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from nanoflow import plugin
from nanoflow.core.registry.roles import Role

INDENT = " " * 4


def methods(product: type) -> str:
    """All abstract methods of a contract, or all that it has if none is abstract, each with the start of a body."""
    names = sorted(_abstract(product)) or _public(product)
    ordered = [name for owner in reversed(product.__mro__) for name in vars(owner) if name in names]
    return "\n\n".join(_method(product, name) for name in dict.fromkeys(ordered))


def imports(role: Role) -> str:
    """The import lines of the names that `methods` and a constructor mention."""
    text = methods(role.product)
    words = {*re.findall(r"\w+", text)} - set(dir(role.product))
    lines = [f"import {module}\n" for module in ("numpy as np", "torch") if f"{module.split()[-1]}." in text]
    names = in_order({*(words & set(plugin.__all__)), role.product.__name__, role.context.__name__, "NoOptions"})
    return "\n".join(["".join(lines), f"from nanoflow.plugin import {names}"]).strip()


def in_order(names: set[str]) -> str:
    """Names as they stand in an import: classes before functions."""
    return ", ".join(sorted(names, key=lambda name: (name[0].islower(), name)))


def _abstract(product: type) -> frozenset[str]:
    return getattr(product, "__abstractmethods__", frozenset())


def _public(product: type) -> list[str]:
    return [name for name, value in vars(product).items() if inspect.isfunction(value) and not name.startswith("_")]


def _method(product: type, name: str) -> str:
    value = inspect.getattr_static(product, name)
    is_property = isinstance(value, property)
    function: Any = value.fget if is_property else value
    head = [f"{INDENT}@property"] if is_property else []
    head += [f"{INDENT}def {name}{_signature(function)}:"]
    if name in _abstract(product):
        return "\n".join([*head, f"{INDENT * 2}raise NotImplementedError"])
    return "\n".join([*head, f"{INDENT * 2}return super().{name}({', '.join(_arguments(function))})"])


def _signature(function: Any) -> str:
    """As it is written: annotations are texts there, which `inspect` would quote."""
    return re.sub(r"'([^']*)'", r"\1", str(inspect.signature(function)))


def _arguments(function: Any) -> Iterator[str]:
    _, *parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        yield f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name
