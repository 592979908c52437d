"""tests/house.md: each of its questions has an answer, which is a file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUM_QUESTIONS = 40


def numbered(text: str) -> dict[int, str]:
    """The numbered lines of a Markdown text, by number."""
    return {int(number): line for number, line in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)}


def test_every_question_is_answered_by_a_file() -> None:
    questions, heading, answers = (ROOT / "tests/house.md").read_text(encoding="utf-8").partition("\n## Answers\n")
    assert heading
    assert list(numbered(questions)) == list(numbered(answers)) == list(range(1, NUM_QUESTIONS + 1))
    for number, answer in numbered(answers).items():
        (path,) = re.findall(r"`([^`]+)`", answer)
        assert (ROOT / path).is_file(), f"{number}. {numbered(questions)[number]}: {path} is no file"
