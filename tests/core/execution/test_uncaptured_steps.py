"""Steps that no CUDA graph fits are told, once for each size, where somebody listens."""

from __future__ import annotations

import logging

import pytest

from nanoflow.core.execution import uncaptured_steps
from nanoflow.core.execution.uncaptured_steps import UncapturedSteps


def test_once_for_each_size_and_only_where_somebody_listens(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("a logger of its own")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.WARNING)
    monkeypatch.setattr(uncaptured_steps, "logger", logger)
    steps = UncapturedSteps()
    steps.note(100, 3)
    assert not caplog.records
    logger.setLevel(logging.INFO)
    for num_tokens in (100, 101, 127, 128):
        steps.note(num_tokens, 3)
    assert [record.args for record in caplog.records] == [(100, 3), (128, 3)]
