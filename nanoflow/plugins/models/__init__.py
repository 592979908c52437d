"""Built-in models. Their modules import torch, so they are imported when one is built."""

from __future__ import annotations

from nanoflow.core.hookspecs import hookimpl
from nanoflow.core.interfaces import Component, ModelArch, ModelContext, NoOptions


@hookimpl
def nanoflow_models() -> list[Component]:
    return [Component("qwen3", build=_qwen3, architectures=("Qwen3ForCausalLM",))]


def _qwen3(config: NoOptions, context: ModelContext) -> ModelArch:
    from nanoflow.plugins.models.qwen3 import Qwen3

    return Qwen3(context)
