"""Settings of `nanoflow chat`."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.cli.settings import Settings
from nanoflow.core.config.fields import option


@dataclass(frozen=True)
class ChatConfig(Settings):
    """What `chat` builds, and how the conversation begins."""

    system: str | None = option(None, "what the model is told before the conversation")
