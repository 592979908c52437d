"""Built-in attention backends. Their modules import torch, so they are imported when one is built."""

from __future__ import annotations

from nanoflow.core.hookspecs import hookimpl
from nanoflow.core.interfaces import AttentionBackend, AttentionContext, Component, NoOptions


@hookimpl
def nanoflow_attention_backends() -> list[Component]:
    return [Component("torch", build=_torch)]


def _torch(config: NoOptions, context: AttentionContext) -> AttentionBackend:
    from nanoflow.plugins.attention.torch_paged import TorchAttention

    return TorchAttention(config, context)
