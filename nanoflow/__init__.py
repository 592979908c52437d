"""nanoflow: an LLM inference engine in which every part can be swapped from the command line.

The public names are imported on first use, so that `import nanoflow` costs nothing and plugin packages can import
`hookimpl` and `Component` without paying for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "nanoflow.core.llm",
    "AsyncLLM": "nanoflow.core.async_llm",
    "SamplingParams": "nanoflow.core.config",
    "StructuredOutputsParams": "nanoflow.core.config",
    "RequestOutputKind": "nanoflow.core.config",
    "RequestOutput": "nanoflow.core.types",
    "CompletionOutput": "nanoflow.core.types",
    "Logprob": "nanoflow.core.types",
    "Score": "nanoflow.core.types",
    "Component": "nanoflow.core.interfaces",
    "hookimpl": "nanoflow.core.hookspecs",
    "NanoflowError": "nanoflow.core.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from nanoflow.core.async_llm import AsyncLLM
    from nanoflow.core.config import RequestOutputKind, SamplingParams, StructuredOutputsParams
    from nanoflow.core.errors import NanoflowError
    from nanoflow.core.hookspecs import hookimpl
    from nanoflow.core.interfaces import Component
    from nanoflow.core.llm import LLM
    from nanoflow.core.types import CompletionOutput, Logprob, RequestOutput, Score


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
