"""Whether what a scheduler says about waiting and preempted sequences, and a block manager about evictions, is true."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence


class RefusedBlocks(NamedTuple):
    """A call of `BlockManager.allocate` that returned False.

    Attributes:
        request_id: of the sequence that asked.
        needed: blocks that it would have got, for a sequence without blocks those that it would have shared included.
        free: blocks that were free.
    """

    request_id: str
    needed: int
    free: int

    @classmethod
    def of(cls, blocks: BlockManager, sequence: Sequence, num_tokens: int) -> RefusedBlocks:
        """That of a call with these arguments."""
        before = sequence.num_computed_tokens if sequence.block_table else blocks.match(sequence)
        needed = -(-(before + num_tokens) // blocks.block_size) - len(sequence.block_table)
        return cls(sequence.request_id, needed, blocks.num_free_blocks)


def untrue_wait(
    reason: WaitReason | None, waiting: Collection[str], refused: Collection[RefusedBlocks], *, places_left: int,
    budget_left: int, gave_way: bool,
) -> str:  # fmt: skip
    """What is not true of a reason for waiting, or an empty text. A scheduler need not give any.

    Args:
        reason: what `Scheduler.wait_reason` returned, right after `schedule`.
        waiting: ids of the sequences that wait.
        refused: refusals during that call of `schedule`.
        places_left: how many more sequences may run.
        budget_left: how many more tokens the batch could have had.
        gave_way: whether a sequence lost its blocks in that call.
    """
    if reason is None:
        return ""
    said = f"wait_reason says {reason}"
    if reason.request_id not in waiting:
        return f"{said}, and that sequence does not wait"
    if reason.num_behind != len(waiting) - 1:
        return f"{said}, and {len(waiting) - 1} others wait"
    facts = {
        WaitCause.NO_BLOCKS: (reason.request_id, reason.needed, reason.free) in refused and reason.needed > reason.free,
        WaitCause.MAX_NUM_SEQS: places_left == reason.free == 0 < reason.needed,
        WaitCause.NO_BUDGET: budget_left == reason.free < reason.needed,
        WaitCause.GAVE_WAY: gave_way,
        WaitCause.BEHIND_OTHERS: True,
    }
    if facts.get(reason.cause, False):
        return ""
    return (
        f"{said}, which is not true: {places_left} more sequences and {budget_left} more tokens could run, "
        f"and these found no blocks: {', '.join(map(str, refused)) or 'none'}"
    )


def untrue_preemptions(batch: Batch, refused: Collection[RefusedBlocks]) -> str:
    """What is not true of `Batch.preempt_reasons`, or an empty text. A scheduler need not give any.

    Args:
        batch: a new one.
        refused: refusals since the batch before.
    """
    if not batch.preempt_reasons:
        return ""
    lost = [sequence.request_id for sequence in batch.preempted]
    if [reason.request_id for reason in batch.preempt_reasons] != lost:
        return f"Batch.preempt_reasons is not, in this order, of {lost}, who are in Batch.preempted"
    for reason in batch.preempt_reasons:
        if (reason.needed_by, reason.needed, reason.free) not in refused or reason.needed <= reason.free:
            return f"{reason} is not true: there was no such refusal of blocks"
    return ""


@dataclass
class ReportedEvictions:
    """What evictions can be, as far as it is seen from outside; each method returns what is wrong, or an empty text.

    Attributes:
        filled: blocks that were committed, and whose eviction was not told since: they may be findable.
        found: blocks that were found by another sequence, and whose eviction was not told since: they are findable.
    """

    filled: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)

    def commit(self, blocks: list[int]) -> None:
        """These hold full prefixes now."""
        self.filled.update(blocks)

    def share(self, blocks: list[int]) -> str:
        """These were found."""
        self.found.update(blocks)
        if wrong := set(blocks) - self.filled:
            return f"it shares blocks {sorted(wrong)}, which hold no prefix, or whose eviction was told"
        return ""

    def hand_out(self, blocks: list[int]) -> str:
        """These were given to a sequence that fills them anew."""
        self.filled.difference_update(blocks)
        if wrong := self.found.intersection(blocks):
            return f"it gave away blocks {sorted(wrong)}, which could be found, and did not call on_evict"
        return ""

    def evict(self, block: int) -> str:
        """Its eviction was told."""
        self.found.discard(block)
        if block not in self.filled:
            return f"on_evict was called for block {block}, which holds no prefix, or for which it was called before"
        self.filled.remove(block)
        return ""
