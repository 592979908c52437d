"""Everything that a plugin's author needs is written down."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.registry import component
from nanoflow.core.registry.hookspecs import CONFIG_PACKAGES, hookspecs
from nanoflow.core.registry.roles import ROLES as TABLE

HOOKS = hookspecs(TABLE)
CLASSES = {
    name: value for module in (
        component, *(inspect.getmodule(item) for role in TABLE.values() for item in (role.product, role.context)),
    )
    for name, value in vars(module).items()
    if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
}  # fmt: skip
METHODS = {
    f"{owner}.{name}": value for owner, cls in CLASSES.items() for name, value in vars(cls).items()
    if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    and name not in vars(cls).get("__dataclass_fields__", ())
}  # fmt: skip
ROLES = [role.product.__name__ for role in TABLE.values()]
PLUGIN_GUIDE = Path(__file__).parents[3] / "docs" / "extension.md"


def test_there_is_something_to_check() -> None:
    assert len(HOOKS) == len(TABLE) + 1
    assert CONFIG_PACKAGES in HOOKS
    assert {"ModelArch", "AttentionBackend", "Scheduler", "BlockManager", "Component"} <= set(CLASSES)
    assert {role.context.__name__ for role in TABLE.values()} <= set(CLASSES)
    assert len(METHODS) > 15
    assert set(ROLES) >= {name for name, cls in CLASSES.items() if inspect.isabstract(cls)}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks(name: str) -> None:
    assert len(inspect.getdoc(HOOKS[name]) or "") > 40
    assert "return" in inspect.getfullargspec(HOOKS[name]).annotations


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name: str) -> None:
    own = vars(CLASSES[name]).get("__doc__") or ""
    assert len(own) > 20
    assert not own.startswith(f"{name}("), "that is the one that dataclass makes up"


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    method: Any = METHODS[name]
    assert len(inspect.getdoc(method) or "") > 15


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if "__dataclass_fields__" in vars(cls)])
def test_fields(name: str) -> None:
    documented = inspect.getdoc(CLASSES[name]) or ""
    for field in vars(CLASSES[name])["__dataclass_fields__"]:
        assert field in documented, f"{name}.{field} is not in the docstring"


@pytest.mark.parametrize("role", ROLES)
def test_attributes(role: str) -> None:
    documented = inspect.getdoc(CLASSES[role]) or ""
    for name in inspect.get_annotations(CLASSES[role]):
        assert re.search(rf"^    .*\b{name}\b.*:", documented, re.MULTILINE), f"{role}.{name} is not in the docstring"


@pytest.mark.parametrize("name", HOOKS)
def test_the_plugin_guide_names_every_hook(name: str) -> None:
    assert f"`{name}`" in PLUGIN_GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize("role", ROLES)
def test_the_plugin_guide_names_every_method_of_a_role(role: str) -> None:
    text = PLUGIN_GUIDE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^\*\*`{role}`\*\*.*?\n\n", text, re.DOTALL | re.MULTILINE)
    for name in METHODS:
        owner, _, method = name.partition(".")
        assert owner != role or f"`{method}`" in section, name
