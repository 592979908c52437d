"""GPT-2 as a plugin of nanoflow."""

from __future__ import annotations

from nanoflow.plugin import Component, ModelArch, ModelContext, NoOptions, hookimpl

nanoflow_contract = 1


def _build(config: NoOptions, context: ModelContext) -> ModelArch:
    from nanoflow_gpt2.model import GPT2  # imports torch

    return GPT2(context)


@hookimpl
def nanoflow_models() -> list[Component]:
    return [Component("gpt2", build=_build, architectures=("GPT2LMHeadModel",), positions_key="n_positions")]


@hookimpl
def nanoflow_config_packages() -> list[str]:
    return ["nanoflow_gpt2.conf"]
