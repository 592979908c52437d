"""What is shipped, what it says about itself, and the contracts about imports."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest

import nanoflow
from nanoflow.core.config.version import DISTRIBUTION

ROOT = Path(__file__).parents[1]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of LICENSE-2.0.txt as it is published
ROOMS = ("nanoflow", "conf", "docs", "examples", "benchmarks", "tests")


def run(cwd: Path, *argv: str, **environment: str) -> str:
    """Standard output of Python with these arguments."""
    options = {"cwd": cwd, "env": {**os.environ, **environment}, "timeout": 120, "check": False}
    process = subprocess.run([sys.executable, *argv], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


def tracked_texts() -> Iterator[Path]:
    """Files in which a person, or pip, reads what to install."""
    endings = {".md", ".py", ".toml", ".tmpl", ".yaml"}
    own = Path(__file__)
    for path in (*ROOT.glob("*.*"), *(p for room in ROOMS for p in (ROOT / room).rglob("*"))):
        if path.suffix in endings and path != own:
            yield path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(ROOT, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (path,) = folder.glob("*.whl")
    return path


def what_is_said(wheel: Path, name: str) -> str:
    """A file of the wheel's metadata."""
    folder = f"{DISTRIBUTION.replace('-', '_')}-{nanoflow.__version__}.dist-info"
    return zipfile.ZipFile(wheel).read(f"{folder}/{name}").decode()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_all_that_the_package_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "nanoflow").rglob("*") if path.is_file()}
    conf = {f"nanoflow/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected = {name for name in package | conf if "__pycache__" not in name}
    assert {"nanoflow/conf/config.yaml", "nanoflow/assets/bard/model.safetensors", "nanoflow/py.typed"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    def python(*argv: str) -> str:
        return run(tmp_path, *argv, PYTHONPATH=str(installed), PYTHONSAFEPATH="1", HF_HUB_OFFLINE="1")

    where = python("-c", "import nanoflow; print(nanoflow.__file__)")
    assert Path(where.strip()) == installed / "nanoflow" / "__init__.py"
    assert "max_num_seqs: 256" in python("-m", "nanoflow", "run", "--cfg", "job")
    assert "qwen3" in python("-m", "nanoflow", "plugins")
    assert "bard | model=qwen3" in python("-m", "nanoflow", "run", "prompts=[HAMLET]", "sampling.max_tokens=2")
    assert list(tmp_path.iterdir()) == []


def test_the_metadata(wheel: Path) -> None:
    assert "nanoflow = nanoflow.cli.main:main" in what_is_said(wheel, "entry_points.txt")
    metadata = message_from_string(what_is_said(wheel, "METADATA"))
    assert metadata["Name"] == DISTRIBUTION == "nanoflow-engine"
    assert metadata["Version"] == nanoflow.__version__
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "dev", "eval", "flash", "launchers", "plots", "structured", "test", "testing",
    }  # fmt: skip


def test_the_licence(wheel: Path) -> None:
    metadata = message_from_string(what_is_said(wheel, "METADATA"))
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    text = what_is_said(wheel, "licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == APACHE_2


@pytest.mark.slow
def test_the_sources_hold_what_they_speak_of(tmp_path: Path) -> None:
    run(ROOT, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path))
    (path,) = tmp_path.glob("nanoflow_engine-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/README.md", "conf/config.yaml"} <= names
    assert {"tests/test_packaging.py", "examples/nanoflow-sjf/pyproject.toml", "benchmarks/targets.py"} <= names


def test_only_this_distribution_is_asked_for() -> None:
    """`nanoflow` is another project on the package index: no command, message or dependency may bring it."""
    asked = re.compile(r"""nanoflow\\?\[\w|pip install (?:-U )?['"]?nanoflow(?!-engine)|["']nanoflow *[<>=~!]=""")
    for path in tracked_texts():
        found = asked.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"


def test_the_changelog_tells_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", text, re.MULTILINE)[0] == nanoflow.__version__


def test_every_import_is_a_declared_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = message_from_string(what_is_said(wheel, "METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in required}
    declared = {{"hydra_core": "hydra", "pyyaml": "yaml"}.get(name, name) for name in declared} | {"nanoflow"}
    optional = {"flash_attn", "flashinfer", "llguidance", "lm_eval", "matplotlib", "triton"}  # guarded
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    for name in archive.namelist():
        if name.endswith(".py"):
            code = re.sub(r'""".*?"""', "", archive.read(name).decode(), flags=re.DOTALL)
            used = set(pattern.findall(code)) - set(sys.stdlib_module_names)
            extra = {"hypothesis", "pytest"} if name.startswith("nanoflow/testing/") else optional
            assert used <= declared | extra, name


@pytest.mark.slow
def test_import_contracts() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None, no_cache=True) == 0
