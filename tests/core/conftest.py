"""Checkpoints and their reference outputs, made once a session."""

from __future__ import annotations

import pytest

from tests.core.checkpoints import Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("checkpoints"))
