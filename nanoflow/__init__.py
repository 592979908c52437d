"""nanoflow: an LLM inference engine in which every part can be swapped from the command line.

The public names are imported on first use, so that `import nanoflow` costs nothing. What plugins import is in
`nanoflow.plugin`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanoflow.core.config.version import __version__

_PUBLIC = {
    "LLM": "nanoflow.core.api.llm",
    "AsyncLLM": "nanoflow.core.api.async_llm",
    "SamplingParams": "nanoflow.core.config.sampling_params",
    "StructuredOutputsParams": "nanoflow.core.config.sampling_params",
    "TextPrompt": "nanoflow.core.api.inputs",
    "TokensPrompt": "nanoflow.core.api.inputs",
    "RequestOutputKind": "nanoflow.core.config.sampling_params",
    "RequestOutput": "nanoflow.core.data.outputs",
    "CompletionOutput": "nanoflow.core.data.outputs",
    "Logprob": "nanoflow.core.data.outputs",
    "Score": "nanoflow.core.data.outputs",
    "Component": "nanoflow.core.registry.component",
    "hookimpl": "nanoflow.core.registry.hookspecs",
    "NanoflowError": "nanoflow.core.config.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from nanoflow.core.api.async_llm import AsyncLLM
    from nanoflow.core.api.inputs import TextPrompt, TokensPrompt
    from nanoflow.core.api.llm import LLM
    from nanoflow.core.config.errors import NanoflowError
    from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
    from nanoflow.core.data.outputs import CompletionOutput, Logprob, RequestOutput, Score
    from nanoflow.core.registry.component import Component
    from nanoflow.core.registry.hookspecs import hookimpl


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
