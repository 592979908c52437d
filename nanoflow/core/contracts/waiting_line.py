"""Who waits and who runs, in which order, and why the first one waits."""

from __future__ import annotations

from typing import Any, NamedTuple

from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.reasons import WaitCause, WaitReason
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
    """

    def __init__(self, max_num_seqs: int, blocks: BlockManager) -> None:
        self.max_num_seqs = max_num_seqs
        self.blocks = blocks
        self.waiting: list[Place] = []
        self.running: list[Place] = []
        self.refused: tuple[Sequence, int] | None = None
        self.budget_left = 0
        self.gave_way = False

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

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
