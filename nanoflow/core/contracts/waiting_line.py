"""Who waits and who runs, in which order, how one that runs comes to wait again, and why the first one waits."""

from __future__ import annotations

from bisect import insort
from typing import Any, NamedTuple

from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.reasons import PreemptCause, PreemptReason, WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence


class Place(NamedTuple):
    """A sequence's place in line: by rank, then by arrival."""

    rank: Any
    number: int
    sequence: Sequence


class WaitingLine(Scheduler):
    """What `ContinuousScheduler` knows of sequences in line, and says of them.

    Args:
        max_num_seqs: most running sequences.
        blocks: whom they get their blocks from.

    Attributes:
        waiting, running: in order.
        refused: the waiting sequence that found no blocks in the last call of `schedule`, and how many tokens it was to
            have beside what the cache held.
        budget_left: tokens that this call gave to nobody.
        gave_way: whether it took blocks from running sequences.
        preempted, preempt_reasons: those since the last batch, and why.
    """

    def __init__(self, max_num_seqs: int, blocks: BlockManager) -> None:
        self.max_num_seqs = max_num_seqs
        self.blocks = blocks
        self.waiting: list[Place] = []
        self.running: list[Place] = []
        self.refused: tuple[Sequence, int] | None = None
        self.budget_left = 0
        self.gave_way = False
        self.preempted: list[Sequence] = []
        self.preempt_reasons: list[PreemptReason] = []

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def _preempt(self, place: Place, needed_by: Sequence, num_tokens: int) -> None:
        """Take its blocks from a running sequence, since there are not enough for `num_tokens` of `needed_by`."""
        victim, size = place.sequence, self.blocks.block_size
        needed = -(-(needed_by.num_computed_tokens + num_tokens) // size) - len(needed_by.block_table)
        free = self.blocks.num_free_blocks
        self.preempted.append(victim)
        self.preempt_reasons.append(
            PreemptReason(PreemptCause.NO_BLOCKS, victim.request_id, needed_by.request_id, needed, free)
        )
        self.blocks.free(victim)
        victim.num_preemptions += 1
        insort(self.waiting, place)

    def wait_reason(self) -> WaitReason | None:
        if not self.waiting:
            return None
        first, num_behind = self.waiting[0].sequence.request_id, len(self.waiting) - 1
        if self.gave_way:
            return WaitReason(WaitCause.GAVE_WAY, first, num_behind=num_behind)
        if self.refused is not None:
            sequence, num_tokens = self.refused
            needed = -(-(self.blocks.match(sequence) + num_tokens) // self.blocks.block_size)
            free = self.blocks.num_free_blocks
            return WaitReason(WaitCause.NO_BLOCKS, sequence.request_id, needed, free, num_behind)
        if len(self.running) == self.max_num_seqs:
            return WaitReason(WaitCause.MAX_NUM_SEQS, first, 1, 0, num_behind)
        if self.budget_left == 0:
            return WaitReason(WaitCause.NO_BUDGET, first, 1, 0, num_behind)
        return WaitReason(WaitCause.BEHIND_OTHERS, first, num_behind=num_behind)
