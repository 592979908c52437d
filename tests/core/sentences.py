"""Errors that a user can cause say what was wrong and what would be right, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nanoflow.core.config.errors import NanoflowError


@contextmanager
def raises_sentence(error: type[NanoflowError], *words: str) -> Iterator[None]:
    """Expect exactly this class of error, with a message that is one clear sentence and holds all of `words`."""
    with pytest.raises(NanoflowError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    assert all(word in message for word in words), message
    assert message[-1] in ".?", message
    assert "\n" not in message, message
    assert 5 <= len(message.split()) < 80, message
    assert "object at 0x" not in message, message
