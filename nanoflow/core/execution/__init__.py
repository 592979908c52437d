"""Runs batches on devices: executors, step inputs, CUDA graphs, the model runner, the size of the KV cache."""

from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.plan import Plan, make_plan
from nanoflow.core.execution.rank_executor import RankExecutor, worker_loop

__all__ = [
    "LocalExecutor",
    "ModelRunner",
    "Plan",
    "RankExecutor",
    "make_plan",
    "worker_loop",
]
