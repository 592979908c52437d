"""What several commands print."""

from __future__ import annotations

import io

import pytest

from nanoflow.cli import show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show.styled("x", show.BOLD, Terminal()) == "\033[1mx\033[0m"
    assert show.styled("x", show.BOLD, io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert show.styled("x", show.BOLD, Terminal()) == "x"


def test_a_table_aligns_numbers_to_the_right() -> None:
    table = show.table(("name", "n"), [("a", 1), ("bcdef", 20), ("c", None)])
    assert table.splitlines() == ["name  |  n", "----- | --", "a     |  1", "bcdef | 20", "c     |"]
    assert show.table(("name",), []).splitlines() == ["name", "----"]
