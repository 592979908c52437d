"""What callers use: `LLM`, `AsyncLLM`, and the scoring of given texts."""

from nanoflow.core.api.async_llm import AsyncLLM
from nanoflow.core.api.llm import LLM

__all__ = [
    "LLM",
    "AsyncLLM",
]
