"""First come, first served."""

from __future__ import annotations

from nanoflow.core.types import Sequence
from nanoflow.plugins.schedulers.continuous import ContinuousScheduler


class FCFSScheduler(ContinuousScheduler):
    """Serves sequences in the order of their arrival."""

    def rank(self, sequence: Sequence) -> int:
        return 0
