"""Every shape suffix in the code is explained in docs/glossary.md."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPED = re.compile(r"[a-z_][a-z0-9_]*_(\d*[A-Z][A-Z0-9]*)")  # `query_TNH`, `gate_up_X2FD`, `best_2SC`


def suffixes_of(name: str) -> str:
    """The dims that a name ends in, a character each; empty for a name without any."""
    match = SHAPED.fullmatch(name)
    return match[1] if match else ""


def names_in(path: Path) -> Iterator[str]:
    """All names of a source file; those in comments and texts are none."""
    with tokenize.open(path) as file:
        yield from (token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME)


def explained() -> set[str]:
    """The suffixes in the glossary's table."""
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("## Shape suffixes")[2]
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return {suffix for cell in cells for suffix in re.findall(r"`(.)`", cell)}


def test_names() -> None:
    names = ["query_TNH", "best_2SC", "_x_T", "BLOCK_N", "turn_1", "top_p", "HIDDEN", "LOG2_E", "Shape_T"]
    assert [suffixes_of(name) for name in names] == ["TNH", "2SC", "T", "", "", "", "", "", ""]


def test_every_suffix_is_explained() -> None:
    known, seen = explained(), set()
    for path in sorted((ROOT / "nanoflow").rglob("*.py")):
        for name in names_in(path):
            seen.update(suffixes_of(name))
            unknown = set(suffixes_of(name)) - known
            assert not unknown, f"{path.relative_to(ROOT)}: {name} has {sorted(unknown)}, which docs/glossary.md lacks"
    assert not known - seen, f"docs/glossary.md explains {sorted(known - seen)}, which the code doesn't use"
