"""Built-in attention backends. Their modules import torch, so they are imported when one is asked for."""

from __future__ import annotations

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.registry.component import Component, NoOptions
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.plugins.attention.options import FlashConfig, TorchConfig, flash_missing, interpreted, triton_missing


@hookimpl
def nanoflow_attention_backends() -> list[Component]:
    # For `auto`, by `benchmarks/attention.py` on an H100 that read 3.1 TB/s (bfloat16, head_dim 128, 8 KV heads).
    # Decode of 256 sequences: Triton reads 93-94 % of that, FlashAttention-3 87-92 %, the less the smaller the blocks;
    # at 32 sequences 79 and 81 %. Prefill: FlashAttention-3 does 300 to 680 TFLOP/s, Triton 190 to 440. So the best is
    # the mix of both. `auto` never takes Triton's slow interpreter.
    own = -1 if interpreted() else 20
    return [
        Component("hybrid", build=_hybrid, available=_hybrid_available, supports=_hybrid_supports, priority=30),
        Component("triton", build=_triton, available=triton_missing, supports=_triton_supports, priority=own),
        Component(
            "flash", build=_flash, config=FlashConfig, available=flash_missing, supports=_flash_supports, priority=10
        ),
        Component("torch", build=_torch, config=TorchConfig),
    ]


def _torch(config: TorchConfig, context: AttentionContext) -> AttentionBackend:
    from nanoflow.plugins.attention.torch.backend import TorchAttention
    from nanoflow.plugins.attention.torch.reference import ReferenceAttention

    return TorchAttention(config, context) if config.group else ReferenceAttention(config, context)


def _triton(config: NoOptions, context: AttentionContext) -> AttentionBackend:
    from nanoflow.plugins.attention.triton.backend import TritonAttention

    return TritonAttention(config, context)


def _triton_supports(config: NoOptions, context: AttentionContext) -> str | None:
    from nanoflow.plugins.attention.triton.backend import why_not

    return why_not(context, interpreted=interpreted())


def _flash(config: FlashConfig, context: AttentionContext) -> AttentionBackend:
    from nanoflow.plugins.attention.flash.backend import FlashAttention

    return FlashAttention(config, context)


def _flash_supports(config: FlashConfig, context: AttentionContext) -> str | None:
    from nanoflow.plugins.attention.flash.versions import choose

    return choose(context)[1] or None


def _hybrid(config: NoOptions, context: AttentionContext) -> AttentionBackend:
    from nanoflow.plugins.attention.hybrid import HybridAttention

    return HybridAttention(config, context)


def _hybrid_available() -> str | None:
    return triton_missing() or flash_missing()


def _hybrid_supports(config: NoOptions, context: AttentionContext) -> str | None:
    return _flash_supports(FlashConfig(), context) or _triton_supports(config, context)
