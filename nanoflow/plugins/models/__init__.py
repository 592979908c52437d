"""Built-in models. Their modules import torch, so they are imported when one is built."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.registry.component import Component, NoOptions
from nanoflow.core.registry.hookspecs import hookimpl


@hookimpl
def nanoflow_models() -> list[Component]:
    return [
        Component("llama", build=partial(_build, "llama", "Llama"), architectures=("LlamaForCausalLM",)),
        Component("mistral", build=partial(_build, "mistral", "Mistral"), architectures=("MistralForCausalLM",)),
        Component("qwen2", build=partial(_build, "qwen2", "Qwen2"), architectures=("Qwen2ForCausalLM",)),
        Component("qwen3", build=partial(_build, "qwen3", "Qwen3"), architectures=("Qwen3ForCausalLM",)),
        Component("qwen3_moe", build=partial(_build, "qwen3_moe", "Qwen3MoE"), architectures=("Qwen3MoeForCausalLM",)),
    ]


def _build(module: str, name: str, config: NoOptions, context: ModelContext) -> ModelArch:
    model: type[ModelArch] = getattr(import_module(f"nanoflow.plugins.models.{module}"), name)
    return model(context)
