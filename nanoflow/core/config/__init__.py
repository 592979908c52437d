"""Options of the engine and of a request, and the errors that a user can cause. Imports nothing of nanoflow."""

from nanoflow.core.config.engine_config import (
    BUNDLED_CHECKPOINT,
    Choice,
    Config,
    EngineConfig,
    PluginChoice,
    SchedulerConfig,
)
from nanoflow.core.config.errors import CheckpointError, ConfigError, NanoflowError, PluginError, RequestError
from nanoflow.core.config.fields import is_int, is_number, option, require
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.version import __version__

__all__ = [
    "BUNDLED_CHECKPOINT",
    "CheckpointError",
    "Choice",
    "Config",
    "ConfigError",
    "EngineConfig",
    "NanoflowError",
    "PluginChoice",
    "PluginError",
    "RequestError",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutputsParams",
    "__version__",
    "is_int",
    "is_number",
    "option",
    "require",
]
