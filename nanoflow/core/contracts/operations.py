"""The contract of a set of operations: functions that take the place of those in `core/ops` on one kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nanoflow.core.ops import Operation


@dataclass(frozen=True)
class OperationsContext:
    """What a set of operations is built from: the device that the engine computes on."""

    device: torch.device


class OperationSet(ABC):
    """Operations that a package brings. Built once with the engine, on every rank."""

    @abstractmethod
    def operations(self) -> list[Operation]:
        """What takes the place of operations; those for other types of device are passed over."""
