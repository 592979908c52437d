"""The contract of a scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitReason
from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class SchedulerContext:
    """What a scheduler is built from.

    Attributes:
        block_manager: the only way to blocks.
        max_model_len: most tokens in a sequence.
    """

    block_manager: BlockManager
    max_model_len: int


class Scheduler(ABC):
    """Decides who runs in the next step, how many tokens each, and who has to give way.

    It counts tokens and never looks at their values, so that a step can be planned before the previous one's tokens
    are known. The engine calls, in this order and from one thread: `add` and `abort` at any time between steps,
    `schedule` for each step, `update` once for each batch, in the order of the batches. With overlap, `schedule` for
    step n+1 comes before `update` for step n.

    Its config derives from `SchedulerConfig`. No batch has more than `max_num_seqs` sequences, no more than these hold
    blocks at a time, and no batch has more than its `budget` of tokens.
    """

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. The engine has checked that it fits into an empty cache."""

    @abstractmethod
    def abort(self, request_id: str) -> Sequence | None:
        """Forget an unfinished request and free its blocks before the next step; None if there is no such request.

        The engine calls `Sequence.finish` itself. A result still in flight for it is ignored.
        """

    @abstractmethod
    def schedule(self) -> Batch | None:
        """The next step's batch, or None if nothing can run now; something can while requests are unfinished and no
        batch is in flight.

        Every sequence in it has had `BlockManager.allocate` for its tokens and is entered with `Batch.add`, decoding
        ones before the others. A sequence is taken only while `num_uncomputed_tokens` > 0, and one without blocks only
        while none of its tokens is in flight. Sequences whose blocks were freed to make room are listed in
        `Batch.preempted`, or in that of the next batch if this call returns None; why may be said, for each of them, in
        `Batch.preempt_reasons`.
        """

    @abstractmethod
    def update(self, batch: Batch) -> list[Sequence]:
        """Account for a batch whose tokens have been appended to its sequences.

        Returns the sequences of `batch` that ended with it (`is_finished`), their blocks freed, each exactly once.
        Sequences aborted, or ended by an earlier batch, are passed over.
        """

    def wait_reason(self) -> WaitReason | None:
        """Why the first of those that wait was left out by the last call of `schedule`, and how many wait behind it.

        None if nobody waits. Called right after `schedule`, and only if somebody observes the engine, so that a reason
        costs nothing else. By default a scheduler gives none.
        """
        return None

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Unfinished sequences without blocks."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Unfinished sequences with blocks."""
