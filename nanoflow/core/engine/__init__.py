"""The loop: requests in, steps, outputs out; in the caller's thread or in one of its own."""

from nanoflow.core.engine.build import build_engine
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.engine_thread import EngineThread

__all__ = [
    "Engine",
    "EngineThread",
    "build_engine",
]
