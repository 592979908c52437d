"""GPT-2 as a plugin of nanoflow."""

from __future__ import annotations

from typing import Any

from nanoflow import Component, hookimpl


def _build(config: Any, context: Any) -> Any:
    from nanoflow_gpt2.model import GPT2  # imports torch

    return GPT2(context)


@hookimpl
def nanoflow_models() -> list[Component]:
    return [Component("gpt2", build=_build, architectures=("GPT2LMHeadModel",), positions_key="n_positions")]


@hookimpl
def nanoflow_config_packages() -> list[str]:
    return ["nanoflow_gpt2.conf"]
