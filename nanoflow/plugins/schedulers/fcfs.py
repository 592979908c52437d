"""First come, first served."""

from __future__ import annotations

from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.data.sequence import Sequence


class FCFSScheduler(ContinuousScheduler):
    """Serves sequences in the order of their arrival."""

    def rank(self, sequence: Sequence) -> int:
        return 0
