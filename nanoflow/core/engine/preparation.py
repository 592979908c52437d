"""Sequences that the scheduler does not know yet, since logits processors prepare something for them."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeAlias

from nanoflow.core.data.constraint import Constraint
from nanoflow.core.data.reasons import WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.sampling.logits_processors import LogitsProcessors

LONGEST_WAIT = 0.05  # seconds that a step waits for what is prepared, such as a grammar, if there is nothing else to do
Begun: TypeAlias = "list[tuple[str, Future[Constraint | None]]]"


class Preparation(dict[str, tuple[Sequence, Begun]]):
    """Sequences by their ids, each with what was begun for it: names of processors and futures.

    Args:
        processors: whose futures these are.
    """

    def __init__(self, processors: LogitsProcessors) -> None:
        super().__init__()
        self.processors = processors

    def cancel(self, sequence_id: str) -> None:
        """Forget a sequence that was aborted."""
        for _, future in self.pop(sequence_id)[1]:
            future.cancel()

    def take(self, *, may_wait: bool) -> list[Sequence]:
        """Sequences for which all is prepared; those for which something failed are finished.

        Args:
            may_wait: whether there is nothing else to do than to wait for some of it, but not long.
        """
        if may_wait:
            futures = [future for _, begun in self.values() for _, future in begun]
            wait([future for future in futures if not future.done()], LONGEST_WAIT, FIRST_COMPLETED)
        ready = [(key, *item) for key, item in self.items() if all(future.done() for _, future in item[1])]
        for key, sequence, begun in ready:
            del self[key]
            self.processors.finish_preparing(sequence, begun)
        return [sequence for _, sequence, _ in ready]

    def wait_reason(self) -> WaitReason:
        """Why they wait."""
        return WaitReason(WaitCause.NOT_READY, next(iter(self)), num_behind=len(self) - 1)
