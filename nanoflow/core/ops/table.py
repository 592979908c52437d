"""The table of operations: what layers, sampler and runner compute with, and what is chosen for a device.

Each operation is a function in plain PyTorch, which is its specification and runs on any device. What is faster on one
kind of device is registered beside it as an `Operation`, by the kernels of this project or by an installed package.
Nothing is kept in modules: an engine chooses once (`Ops.select`) and hands its `Ops` down to those who compute.

A fused operation may decline: it returns None, having done nothing, and its caller makes two operations of it. That is
all that its PyTorch function does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch

from nanoflow.core.config.errors import PluginError, did_you_mean
from nanoflow.core.ops.allreduce import allreduce_add_rms_norm
from nanoflow.core.ops.attention import norm_rotate, norm_rotate_store
from nanoflow.core.ops.embedding import embedding
from nanoflow.core.ops.experts import mix_experts
from nanoflow.core.ops.linear import linear, linear_residual, norm_linear
from nanoflow.core.ops.logits import adjust_logits
from nanoflow.core.ops.norm import add_rms_norm, rms_norm
from nanoflow.core.ops.sampling import sample
from nanoflow.core.ops.step_inputs import gather_step_inputs, receive

# What else does the work of an operation: a fused one is not used where only the other is replaced.
FUSED_FROM = {
    "norm_linear": ("linear", "rms_norm", "add_rms_norm"), "linear_residual": ("linear",),
    "norm_rotate_store": ("norm_rotate",), "allreduce_add_rms_norm": ("add_rms_norm",),
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """What takes the place of an operation on one kind of device.

    Attributes:
        name: an attribute of `Ops`.
        device_type: as in `torch.device.type`, such as "cuda" (ROCm too), "xpu", "mps" or "cpu".
        function: with the arguments and results of the function in `core.ops` that it replaces; or where it is, as
            "package.module:function", to be imported when it is chosen.
    """

    name: str
    device_type: str
    function: Callable[..., Any] | str

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        if callable(self.function):
            return self.function
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function


@dataclass(frozen=True, slots=True)
class Ops:
    """One function for each operation; by default those in plain PyTorch, which say what each is given and gives."""

    linear: Callable[..., torch.Tensor] = linear
    norm_linear: Callable[..., torch.Tensor | None] = norm_linear
    linear_residual: Callable[..., torch.Tensor | None] = linear_residual
    rms_norm: Callable[..., torch.Tensor] = rms_norm
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = add_rms_norm
    allreduce_add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] = allreduce_add_rms_norm
    norm_rotate: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = norm_rotate
    norm_rotate_store: Callable[..., torch.Tensor | None] = norm_rotate_store
    embedding: Callable[..., torch.Tensor] = embedding
    mix_experts: Callable[..., torch.Tensor] = mix_experts
    sample: Callable[..., torch.Tensor] = sample
    adjust_logits: Callable[..., torch.Tensor] = adjust_logits
    receive: Callable[..., None] = receive
    gather_step_inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = gather_step_inputs

    @classmethod
    def select(cls, device: torch.device, own: Iterable[Operation] = (), extra: Iterable[Operation] = ()) -> Ops:
        """The operations for a device.

        Args:
            device: where they will run.
            own: this project's kernels.
            extra: those of installed packages, which come before `own`.

        Raises:
            PluginError: there is no operation of that name, or two of `extra` replace the same one.
        """
        replaced: dict[str, Operation] = {}
        for operation in extra:
            names = [field.name for field in fields(cls)]
            if operation.name not in names:
                raise PluginError(
                    f"There is no operation {operation.name!r} to replace; there are: {', '.join(names)}."
                    f"{did_you_mean(operation.name, names)}"
                )
            if operation.device_type != device.type:
                continue
            if operation.name in replaced:
                raise PluginError(
                    f"Two plugins replace the operation {operation.name!r} on {device.type}; leave one of them out."
                )
            replaced[operation.name] = operation
        chosen = {
            operation.name: operation
            for operation in own
            if operation.device_type == device.type and replaced.keys().isdisjoint(FUSED_FROM.get(operation.name, ()))
        }
        return cls(**{name: operation.load() for name, operation in (chosen | replaced).items()})
