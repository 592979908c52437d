"""Why a sequence waits, and why one lost its blocks: what a scheduler tells observers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WaitCause(str, Enum):
    """What the first waiting sequence lacks; the numbers of its `WaitReason` are of what this says."""

    NO_BLOCKS = "no_blocks"  # needed: blocks that it would hold, shared ones included; free: blocks that are free
    NO_BUDGET = "no_budget"  # needed: 1 token; free: tokens of the step that nobody has taken
    MAX_NUM_SEQS = "max_num_seqs"  # needed: 1 place among the running ones; free: places left
    GAVE_WAY = "gave_way"  # blocks were taken from a running sequence, and nobody behind it may have them
    BEHIND_OTHERS = "behind_others"  # the scheduler did not come to it in this step
    NOT_READY = "not_ready"  # the scheduler does not know it yet: its grammar is being compiled

    __str__ = str.__str__


class PreemptCause(str, Enum):
    """Why a running sequence had to give way."""

    NO_BLOCKS = "no_blocks"  # a sequence that goes first needed them

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class WaitReason:
    """Why the first waiting sequence is not in a batch, and how many wait behind it.

    Attributes:
        cause: what is missing.
        request_id: the sequence's.
        needed, free: how much it takes, and how much there was; `WaitCause` says of what. 0 where the cause has none.
        num_behind: other sequences that wait.
    """

    cause: WaitCause
    request_id: str
    needed: int = 0
    free: int = 0
    num_behind: int = 0


@dataclass(frozen=True, slots=True)
class PreemptReason:
    """Why a running sequence lost its blocks.

    Attributes:
        cause: what was missing.
        request_id: the one that lost them.
        needed_by: the sequence for which blocks were missing; it may be the same one.
        needed: new blocks that `needed_by` asked for.
        free: blocks that were free.
    """

    cause: PreemptCause
    request_id: str
    needed_by: str
    needed: int
    free: int
