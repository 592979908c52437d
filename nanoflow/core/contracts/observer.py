"""The contract of an observer: it is told what the engine decides and does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import PreemptReason, WaitReason
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class ObserverContext:
    """What an observer is built from.

    Attributes:
        clock: the engine's; seconds. Times of requests are on it, too.
        num_blocks, block_size: of the KV cache.
        max_num_seqs: most sequences in a batch.
        max_num_batched_tokens: most tokens in a batch.
    """

    clock: Callable[[], float]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


class Observer:
    """Told of what happens in the engine, in the thread of its steps, in the order in which it happens.

    Each method does nothing by default; a subclass overrides those that it needs. What it is given is the engine's own
    and lives on: it may read it during the call, must not change it, and copies what it wants to keep. What it spends
    is time of the step. If it raises, it is told nothing more, and the engine goes on.
    """

    def on_add(self, sequence: Sequence) -> None:
        """A sequence was added: one for each of a request's `n` completions."""

    def on_preempt(self, sequence: Sequence, reason: PreemptReason | None) -> None:
        """A sequence lost its blocks and waits again. None: the scheduler gave no reason."""

    def on_schedule(self, batch: Batch, reasons: list[WaitReason]) -> None:
        """The next step's batch was made. `reasons` say why others wait, one for each place in which some do; they are
        empty if nobody does, or if the scheduler gives none."""

    def on_submit(self, batch: Batch) -> None:
        """The step was handed to the device; with overlap it has only begun."""

    def on_result(self, batch: Batch) -> None:
        """The step's tokens are there and have been appended to their sequences. Batches come in their order."""

    def on_finish(self, sequence: Sequence) -> None:
        """A sequence ended; `finish_reason` says why. Its blocks are free."""

    def on_evict(self, block: int) -> None:
        """The block with this id no longer holds a prefix that can be found."""
