"""What is shipped, what it says about itself, and the contracts about imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import nanoflow

ROOT = Path(__file__).parents[1]


def run(cwd: Path, *argv: str, **environment: str) -> str:
    """Standard output of Python with these arguments."""
    options = {"cwd": cwd, "env": {**os.environ, **environment}, "timeout": 120, "check": False}
    process = subprocess.run([sys.executable, *argv], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(ROOT, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (path,) = folder.glob("*.whl")
    return path


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
    archive = zipfile.ZipFile(wheel)
    folder = f"nanoflow-{nanoflow.__version__}.dist-info"
    assert "nanoflow = nanoflow.cli.main:main" in archive.read(f"{folder}/entry_points.txt").decode()
    metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == nanoflow.__version__
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "dev", "eval", "flash", "launchers", "plots", "structured", "test", "testing",
    }  # fmt: skip


def test_every_import_is_a_declared_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = message_from_string(archive.read(f"nanoflow-{nanoflow.__version__}.dist-info/METADATA").decode())
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
