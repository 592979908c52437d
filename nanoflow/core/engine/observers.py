"""Telling several observers, none of which can stop the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.observer import Observer
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitReason

logger = logging.getLogger("nanoflow")


class Observers:
    """Observers that are told one after the other. One that raises is told nothing more."""

    def __init__(self, observers: list[Observer]) -> None:
        self.observers = observers

    @classmethod
    def watching(cls, observers: Iterable[Observer], block_manager: BlockManager) -> Observers | None:
        """These observers, told of the block manager's evictions as well; None if there are none."""
        observers = list(observers)
        if not observers:
            return None
        made = cls(observers)
        block_manager.on_evict = made.evicted
        return made

    def tell(self, what: str, *arguments: Any) -> None:
        """Call the method `what` of each."""
        for observer in list(self.observers):
            try:
                getattr(observer, what)(*arguments)
            except Exception as error:
                self.observers.remove(observer)
                name = type(observer).__name__
                logger.warning("observer %s failed in %s and is told nothing more", name, what, exc_info=error)

    def scheduled(self, batch: Batch, reasons: list[WaitReason]) -> None:
        """Tell of a new batch, and before that of those that had to give way for it."""
        for sequence, reason in zip_longest(batch.preempted, batch.preempt_reasons):
            self.tell("on_preempt", sequence, reason)
        self.tell("on_schedule", batch, reasons)

    def evicted(self, block: int) -> None:
        """Tell of a block whose content was given up."""
        self.tell("on_evict", block)
