"""The error that a command line can cause, beside those of its settings."""

from __future__ import annotations

from nanoflow.core.config.errors import NanoflowError


class UsageError(NanoflowError):
    """A command line that cannot be read, rather than a setting that cannot be used. The exit code is 2."""
