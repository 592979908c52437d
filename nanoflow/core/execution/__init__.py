"""Runs batches on a device: step inputs, CUDA graphs, the model runner, the size of the KV cache."""

from nanoflow.core.execution.model_runner import ModelRunner, PendingStep
from nanoflow.core.execution.plan import Plan, make_plan

__all__ = [
    "ModelRunner",
    "PendingStep",
    "Plan",
    "make_plan",
]
