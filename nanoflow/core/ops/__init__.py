"""One table of operations: what each computes, in plain PyTorch, and what is registered for a device beside it."""

from nanoflow.core.ops.table import Operation, Ops

__all__ = [
    "Operation",
    "Ops",
]
