"""The code in README and docs runs as it stands there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nanoflow.core.config import SamplingParams

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    for example in python_blocks("README.md"):
        exec(example, {})
    printed = capsys.readouterr().out
    assert "HAMLET:" in printed
    assert "JULIET:\nO Romeo" in printed


def test_sampling_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """Its example runs, and it describes every field with the default that it has."""
    (example,) = python_blocks("docs/sampling.md")
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 17
    text = (ROOT / "docs/sampling.md").read_text(encoding="utf-8")
    for field in fields(SamplingParams):
        default = getattr(SamplingParams(), field.name)
        shown = str(default).lower()
        assert f"| `{field.name}` | {shown} |" in text or f"`{field.name}` ({shown})" in text, field.name


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    for example in python_blocks("docs/serving.md"):
        exec(example, {})
    assert "\n2 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links(name: str) -> None:
    """A link to a file of the repository leads to one."""
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert ((ROOT / name).parent / target).exists(), target
