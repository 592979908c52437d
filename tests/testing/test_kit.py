"""The kit as a plugin's author meets it: its docs, its extra, and what importing it costs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoflow import testing
from nanoflow.testing.suite import Suite

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "testing.md"
SUITES = [getattr(testing, name) for name in testing.__all__]
QUICK = "nothing_to_do or abort_in_flight or half_precision or test_refused"


@pytest.mark.slow
def test_the_examples_of_the_guide_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    (tmp_path / "test_mine.py").write_text("\n".join(blocks))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", QUICK, str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^12 passed", process.stdout, re.MULTILINE), process.stdout


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_attribute_is_documented(suite: type[Suite]) -> None:
    attributes = set(inspect.get_annotations(suite))
    assert attributes
    guide = GUIDE.read_text(encoding="utf-8")
    for name in attributes:
        assert re.search(rf"^\s*{name}: ", inspect.getdoc(suite) or "", re.MULTILINE), name
        assert f"| `{name}` |" in guide, name
    assert f"`{suite.__name__}`" in guide


def test_importing_it_is_cheap() -> None:
    code = "import sys, nanoflow.testing; print(sorted({'torch', 'transformers', 'hypothesis'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert printed.stdout.strip() == "[]"


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match=r"'nanoflow\.testing' has no attribute 'EngineSuite'"):
        testing.EngineSuite  # noqa: B018
