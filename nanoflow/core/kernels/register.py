"""Which Triton kernel does which operation on a GPU. Importing this costs no Triton: kernels are loaded when chosen."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nanoflow.core.ops import Operation, Ops

PLACES = {
    "linear": "gemm.dispatch:linear",
    "norm_linear": "gemm.dispatch:norm_linear",
    "linear_residual": "gemm.dispatch:linear_residual",
    "rms_norm": "norm:rms_norm",
    "add_rms_norm": "norm:add_rms_norm",
    "allreduce_add_rms_norm": "allreduce_rmsnorm:allreduce_add_rms_norm",
    "norm_rotate_store": "rotary:norm_rotate_store",
    "embedding": "embedding:embedding",
    "mix_experts": "experts:mix_experts",
    "sample": "sampling:sample",
    "adjust_logits": "logits:adjust_logits",
    "receive": "step_inputs:receive",
    "gather_step_inputs": "step_inputs:gather_step_inputs",
}
KERNELS = tuple(Operation(name, "cuda", f"{__package__}.{place}") for name, place in PLACES.items())


def select_ops(device: torch.device, *, accelerate: bool = True, extra: Iterable[Operation] = ()) -> Ops:
    """The operations that an engine on this device computes with.

    Args:
        device: where.
        accelerate: False for plain PyTorch alone, whatever is registered.
        extra: what installed packages replace.

    Raises:
        PluginError: as `Ops.select`.
    """
    return Ops.select(device, KERNELS, extra) if accelerate else Ops()
