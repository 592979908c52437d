"""Virtual environments for tests that install wheels."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def call(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, without a network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": cwd, "env": environment | {"HF_HUB_OFFLINE": "1"}, "timeout": 300, "check": False}
    return subprocess.run([str(argument) for argument in argv], capture_output=True, text=True, **options)


def done(process: subprocess.CompletedProcess[str]) -> str:
    """What a command that went well printed."""
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def build_wheel(source: Path, folder: Path) -> None:
    """Put the wheel of a package into `folder`."""
    done(call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source))


class Environment:
    """What is installed here, nanoflow and plugins apart, and the wheels of `wheels` in place of them."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        venv.create(folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.cwd = folder / "cwd"
        self.cwd.mkdir()
        self.install(*sorted(wheels.glob("*.whl")))
        # Only now what the wheels need: pip would take this nanoflow for theirs.
        place = done(self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (Path(place.strip()) / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
        assert str(folder) in done(self.python("-c", "import nanoflow; print(nanoflow.__file__)"))

    def install(self, *what: Path) -> None:
        """Wheels, or folders with the sources of packages."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def pip(self, *argv: object) -> None:
        """Run pip for this environment."""
        done(call(sys.executable, "-m", "pip", "--quiet", "--python", self.bin / "python", *argv))

    def python(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """Run its Python in an empty folder."""
        return call(self.bin / "python", *argv, cwd=self.cwd)

    def nanoflow(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """Run its nanoflow there."""
        return call(self.bin / "nanoflow", *argv, cwd=self.cwd)

    def pytest(self, *tests: Path) -> str:
        """Run tests, all of which must pass."""
        return done(self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests))
