"""Running the command line inside the test process, and installing plugin packages that exist for one test only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from nanoflow.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence on standard error, checked to be no more than that."""
        assert self.err.startswith("nanoflow: error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out + self.err
        return self.err.removeprefix("nanoflow: error: ").strip()


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """`cli("run", "engine.seed=1")`: the outcome of that command, run in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*argv: str) -> Outcome:
        code = main(list(argv))
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install("theirs", {"__init__.py": ...})`: as if a distribution with that entry point had been installed."""
    names: list[str] = []

    def make(name: str, sources: dict[str, str], version: str = "1.2", requires: str = "nanoflow-engine") -> None:
        names.append(name)
        site = tmp_path / f"site-{name}"
        metadata = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n",
            "entry_points.txt": f"[nanoflow]\n{name} = {name}\n",
        }
        files = {f"{name}/{path}": text for path, text in sources.items()}
        files |= {f"{name}-{version}.dist-info/{path}": text for path, text in metadata.items()}
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(dedent(text))
        monkeypatch.syspath_prepend(str(site))

    yield make
    for module in [m for m in sys.modules if m.partition(".")[0] in names]:
        del sys.modules[module]
