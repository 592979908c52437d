"""What `nanoflow plugins new` writes can be installed, used and tested as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.cli.new_plugin import write
from nanoflow.core.registry.roles import ROLES
from tests.environment import ROOT, Environment, build_wheel, done


def test_packages_of_all_roles(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    build_wheel(ROOT, tmp_path / "wheels")
    environment = Environment(tmp_path / "env", tmp_path / "wheels")
    for role in ROLES:
        printed = done(environment.nanoflow("plugins", "new", f"my-{role}", "--role", role))
        assert printed.startswith(f"Wrote nanoflow-my-{role}. Install it, and run its tests:\n")
    folders = [environment.cwd / f"nanoflow-my-{role}" for role in ROLES]
    environment.install(*folders)
    chosen = [f"{role}=my-{role}" for role in ROLES if role != "model"]  # the bundled checkpoint is no Llama
    run = environment.nanoflow("run", "prompts=[HAMLET]", "sampling.max_tokens=2", "scheduler.places_per_token=1",
                               *chosen)  # fmt: skip
    assert all(choice in done(run) for choice in chosen)
    assert " passed" in environment.pytest(*(folder / "tests" for folder in folders))


@pytest.mark.parametrize("role", ROLES)
def test_files(role: str, tmp_path: Path) -> None:
    """Nothing is left to fill in."""
    folder = write("my_own", role, tmp_path)
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert set(files) == {
        "pyproject.toml", "README.md", "nanoflow_my_own/__init__.py", f"nanoflow_my_own/{role}.py",
        f"nanoflow_my_own/conf/{role}/my_own.yaml", "tests/test_nanoflow_my_own.py",
    }  # fmt: skip
    assert not any(mark in text for text in files.values() for mark in ("@name", "@module", "@role", "@Class", "@vers"))
    for name, text in files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
