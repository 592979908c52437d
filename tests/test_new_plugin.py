"""What `nanoflow plugins new` writes can be installed, used and tested as it stands."""

from __future__ import annotations

import inspect
from abc import ABC
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.plugins import skeleton
from nanoflow.cli.plugins.new import write
from nanoflow.core.registry.contract import CONTRACT
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES, Role, in_config
from tests.core.registry.tables import POINTS, TABLE
from tests.environment import ROOT, Environment, build_wheel, done


@pytest.mark.slow
def test_packages_of_all_roles(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    build_wheel(ROOT, tmp_path / "wheels")
    environment = Environment(tmp_path / "env", tmp_path / "wheels")
    for role in ROLES:
        printed = done(environment.nanoflow("plugins", "new", f"my-{role}", "--role", role))
        assert printed.startswith(f"Wrote nanoflow-my-{role}. Install it, and run its tests:\n")
    folders = [environment.cwd / f"nanoflow-my-{role}" for role in ROLES]
    environment.install(*folders)
    chosen = [
        f"{role}=my-{role}" for role in in_config(ROLES, "one") if role != "model"
    ]  # the bundled checkpoint is no Llama
    run = environment.nanoflow("run", "prompts=[HAMLET]", "sampling.max_tokens=2", "scheduler.places_per_token=1",
                               *chosen)  # fmt: skip
    assert all(choice in done(run) for choice in chosen)
    assert " passed" in environment.pytest(*(folder / "tests" for folder in folders))


@pytest.mark.parametrize("role", TABLE)
def test_files(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to fill in, whether the role has a template of its own or not."""
    registry = Registry.load(extra=POINTS, roles=TABLE)
    monkeypatch.setattr(Registry, "load", lambda: registry)
    folder = write("my_own", role, tmp_path)
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    presets = [f"nanoflow_my_own/conf/{role}/my_own.yaml"] if TABLE[role].cardinality == "one" else []
    assert set(files) == {
        "pyproject.toml", "README.md", "nanoflow_my_own/__init__.py", f"nanoflow_my_own/{role}.py",
        "tests/test_nanoflow_my_own.py", *presets,
    }  # fmt: skip
    assert not any(mark in text for text in files.values() for mark in ("@name", "@module", "@role", "@Class", "@vers"))
    for name, text in files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    assert f"nanoflow_contract = {CONTRACT.version} " in files["nanoflow_my_own/__init__.py"]


def test_the_skeleton_of_a_role_without_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the abstract methods, as the contract has them."""
    registry = Registry.load(extra=POINTS, roles=TABLE)
    monkeypatch.setattr(Registry, "load", lambda: registry)
    folder = write("mine", "watchers", tmp_path)
    code = (folder / "nanoflow_mine" / "watchers.py").read_text()
    assert "from nanoflow.plugin import NoOptions, Watcher, WatcherContext\n" in code
    assert "class Mine(Watcher):\n" in code
    assert "    def on_thing(self, thing: str) -> str:\n        raise NotImplementedError\n" in code
    assert "nanoflow run 'watchers=[mine]'\n" in (folder / "README.md").read_text()
    described = (folder / "nanoflow_mine" / "__init__.py").read_text()
    assert "@hookimpl\ndef nanoflow_watchers() -> list[Component]:" in described
    assert "'sampling.filters={mine: {}}'" in (write("mine", "filters", tmp_path / "2") / "README.md").read_text()


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
def test_the_skeleton_of_every_role(role: Role) -> None:
    """A class with these methods can be made, and all names in it are imported."""
    code = f"{skeleton.imports(role)}\n\nclass Mine({role.product.__name__}):\n{skeleton.methods(role.product)}\n"
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert not inspect.isabstract(scope["Mine"])


def test_the_skeleton_where_nothing_is_abstract() -> None:
    class Optional(ABC):  # noqa: B024
        def on_thing(self, thing: str, *, times: int = 1) -> None:  # noqa: B027
            """Take notice."""

    assert skeleton.methods(Optional) == (
        "    def on_thing(self, thing: str, *, times: int = 1) -> None:\n"
        "        return super().on_thing(thing, times=times)"
    )
