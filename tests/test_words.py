"""Words of our own making, for which the field has others, are in no name and in no document.

Only words that mean nothing else can be tested for; what others mean here, such as `overlap`, is in docs/glossary.md.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAY = {  # instead of -> say
    "rehearsal": "trace_kernels", "rehearse": "trace_kernels", "rehearsed": "trace_kernels", "imagined": "fake_cuda",
    "sums_in_norms": "fused_allreduce_norm", "few_rows": "skinny", "many_rows": "tma", "in_one_go": "fused",
    "summands": "partials", "mailbox": "pinned_io", "row_sampler": "batch_sampler", "row_state": "slot_state",
    "team": "rank_group", "follower": "worker", "beyond_plain": "needs_processors", "made_of": "description",
    "doubtful": "held_back",
}  # fmt: skip
FINE_IN_PROSE = ("team",)


def words_of(name: str) -> str:
    """A name's words in lower case, with `_` between and around them: `_row_sampler_` for `RowSampler`."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return f"_{apart.strip('_').lower()}_"


def unwanted(names: set[str]) -> dict[str, str]:
    """Names that have one of the words in them, and what to say instead. Names of tests are sentences."""
    found = (
        (name, word)
        for name in sorted(names)
        for word in SAY
        if f"_{word}_" in words_of(name) and not (name.startswith("test_") and "_" in word)
    )
    return {name: f"{SAY[word]} instead of {word}" for name, word in found}


def names_in(path: Path) -> Iterator[str]:
    """The file's own name, and all names in it; what stands in comments and texts is none."""
    yield path.stem
    with tokenize.open(path) as file:
        yield from (token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME)


def test_names_are_taken_apart() -> None:
    names = {
        "RowSampler",
        "row_samplers",
        "_few_rows",
        "in_one_go",
        "_HTTPTeam",
        "steam",
        "is_made_of",
        "remade_of",
        "test_made_of_tin",
    }
    assert set(unwanted(names)) == {"RowSampler", "_few_rows", "in_one_go", "_HTTPTeam", "is_made_of"}


@pytest.mark.parametrize("room", ["nanoflow", "tests", "benchmarks", "examples"])
def test_names(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name} ({instead})"
        for path in sorted((ROOT / room).rglob("*.py"))
        for name, instead in unwanted(set(names_in(path))).items()
    ]
    assert not found, "\n".join(found)


def test_documents() -> None:
    pattern = re.compile(rf"\b({'|'.join(word for word in SAY if word not in FINE_IN_PROSE)})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: {word} ({SAY[word.lower()]})"
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for word in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
