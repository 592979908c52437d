"""`nanoflow.plugin`: what it holds, what it promises, and that plugins need nothing else of nanoflow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import nanoflow
from nanoflow import plugin
from nanoflow.cli.plugins.new import write
from nanoflow.core import layers
from nanoflow.core.registry.contract import CONTRACT
from nanoflow.core.registry.roles import ROLES

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "extension.md").read_text(encoding="utf-8")
FOR_USERS = {"nanoflow.integrations.lm_eval"}  # in docs, beside what plugins import


def test_every_name_is_there() -> None:
    for name in plugin.__all__:
        assert getattr(plugin, name) is not None
    assert dir(plugin) == sorted(plugin.__all__)
    assert CONTRACT.version == plugin.CONTRACT_VERSION
    with pytest.raises(AttributeError, match=r"module 'nanoflow\.plugin' has no attribute 'Schedular'"):
        plugin.Schedular  # noqa: B018


def test_what_has_to_be_among_them() -> None:
    assert set(layers.__all__) <= set(plugin.__all__)
    for role in ROLES.values():
        assert getattr(plugin, role.product.__name__) is role.product
        assert getattr(plugin, role.context.__name__) is role.context


def test_no_name_has_two_promises() -> None:
    times = Counter(name for names in plugin.PROMISES.values() for name in names)
    assert set(times.values()) == {1}


def test_it_costs_no_torch() -> None:
    """Neither the module nor any name, layers, operations and `to_device` apart."""
    code = """
        import sys
        from nanoflow import plugin
        for name in plugin.__all__:
            if not plugin._MODULES[name].endswith(("layers", "ops", "transfer")):
                getattr(plugin, name)
        assert "torch" not in sys.modules and "transformers" not in sys.modules, name
        plugin.Linear
        assert "torch" in sys.modules
    """
    subprocess.run([sys.executable, "-c", "if True:" + code], check=True, timeout=120)


@pytest.mark.parametrize("promise", plugin.PROMISES)
def test_the_guide_lists_every_name_with_its_promise(promise: str) -> None:
    (listed,) = re.findall(rf"^\*\*{promise.capitalize()}\*\* names .*?\n\n(.*?)\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[1:3] for line in listed.splitlines()[2:]]
    names = [name for cells, _ in rows for name in re.findall(r"`(\w+)`", cells)]
    assert sorted(names) == sorted(plugin.PROMISES[promise])
    assert all(what.strip() for _, what in rows)


def test_the_guide_has_the_table_of_roles() -> None:
    expected = [
        f"| `{role.name}` | {role.cardinality.replace('_', ' ')} | {_default(role.default)} | `{role.hook}` | "
        f"`{role.product.__name__}` | `{role.context.__name__}` |"
        for role in ROLES.values()
    ]
    (table,) = re.findall(r"^\| role \|.*?\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    assert table.splitlines()[2:-1] == expected


def _default(default: str | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in ([default] if isinstance(default, str) else default)) or "none"


def third_party_code(folder: Path) -> dict[str, str]:
    """All code that somebody else might have written, by name: templates, examples, and code in the docs."""
    sources = {}
    for role in ROLES:
        for file in write("mine", role, folder / role).rglob("*.py"):
            sources[str(file.relative_to(folder))] = file.read_text()
    for file in [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tests" / "packages").rglob("*.py")]:
        sources[str(file.relative_to(ROOT))] = file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if file.name == "reading.md":
            continue  # looks into the core
        blocks = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
        sources |= {f"{file.name} {number}": block for number, block in enumerate(blocks, 1)}
    return sources


def imports(code: str) -> set[tuple[str, str | None]]:
    """The modules of nanoflow that code imports, each with the name that it takes from it."""
    found: set[tuple[str, str | None]] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(node.module, alias.name) for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "nanoflow"}


def test_third_parties_import_nothing_else(tmp_path: Path) -> None:
    sources = third_party_code(tmp_path)
    kinds = ("scheduler/", "examples/", "extension.md", "models.md", "README.md")
    assert all(any(name.startswith(kind) for name in sources) for kind in kinds)
    for place, code in sources.items():
        for module, name in imports(code):
            where = f"{place} imports {module} {name or ''}"
            public = {"nanoflow": nanoflow.__all__, "nanoflow.plugin": plugin.__all__}.get(module)
            if public is None:
                assert module.startswith("nanoflow.testing") or module in FOR_USERS, where
                assert name is None or hasattr(import_module(module), name), where
            else:
                assert name is None or name in public, where


def test_what_is_not_allowed_is_found() -> None:
    code = "def f():\n    from nanoflow.core.layers import Linear\nimport nanoflow.plugins.models, torch\n"
    assert imports(code) == {("nanoflow.core.layers", "Linear"), ("nanoflow.plugins.models", None)}
