"""Settings of `nanoflow chat`."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow.cli.settings import DEFAULTS, Settings
from nanoflow.core.config import BUNDLED_CHECKPOINT, EngineConfig, PluginChoice, SamplingParams, option


@dataclass(frozen=True)
class ChatConfig(Settings):
    """What `chat` builds, and how the conversation begins."""

    checkpoint: str = option(BUNDLED_CHECKPOINT, "a folder or a Hub id; bard is the one that nanoflow ships")
    system: str | None = option(None, "what the model is told before the conversation")
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: PluginChoice = DEFAULTS.model
    attention: PluginChoice = DEFAULTS.attention
    scheduler: PluginChoice = DEFAULTS.scheduler
    block_manager: PluginChoice = DEFAULTS.block_manager
