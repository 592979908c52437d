"""Checkpoints for tests that run an engine."""

from tests.core.conftest import oracle

__all__ = ["oracle"]
