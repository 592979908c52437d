"""Texts of subclasses of `str`, such as NumPy's, as plain ones."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A text of a subclass of `str` as one of `str`; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value
