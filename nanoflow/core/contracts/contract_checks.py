"""For `engine.debug=true`: a scheduler and a block manager with every call checked against their contracts.

What is checked is what the docstrings of the contracts say and can be seen from outside. Each wrapper answers like
what it wraps, so the engine is the same with and without them.
"""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.errors import PluginError
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.reason_checks import (
    RefusedBlocks,
    ReportedEvictions,
    untrue_preemptions,
    untrue_wait,
)
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitReason
from nanoflow.core.data.sequence import Sequence


class CheckedBlockManager(BlockManager):
    """A block manager whose accounts are kept a second time.

    Args:
        blocks: to be checked.
        plugin: what errors call it.

    Attributes:
        step: number of the step that is being planned; counted by `CheckedScheduler`.
        holders: how many sequences hold each block that is held.
        refused: calls of `allocate` that returned False; emptied by `CheckedScheduler`.

    Raises:
        PluginError: from any call after which a promise of `BlockManager` does not hold.
    """

    def __init__(self, blocks: BlockManager, plugin: str) -> None:
        self.blocks = blocks
        self.plugin = plugin
        self.num_blocks = blocks.num_blocks
        self.block_size = blocks.block_size
        self.step = 0
        self.holders: Counter[int] = Counter()
        self.tables: dict[Sequence, list[int]] = {}  # what each sequence was given
        self.num_committed: dict[Sequence, int] = {}  # blocks of each sequence
        self.evictions = ReportedEvictions()
        self.refused: list[RefusedBlocks] = []
        blocks.on_evict = self._evicted

    @property
    def num_queried_tokens(self) -> int:  # type: ignore[override]
        return self.blocks.num_queried_tokens

    @property
    def num_hit_tokens(self) -> int:  # type: ignore[override]
        return self.blocks.num_hit_tokens

    @property
    def num_free_blocks(self) -> int:
        return self.blocks.num_free_blocks

    def match(self, sequence: Sequence) -> int:
        before = list(sequence.block_table)
        found = self.blocks.match(sequence)
        if found % self.block_size or not 0 <= found <= sequence.num_skippable_tokens:
            self._fail(
                sequence, f"match found {found} tokens, not a multiple of {self.block_size} of at most "
                f"{sequence.num_skippable_tokens}"
            )  # fmt: skip
        if sequence.block_table != before:
            self._fail(sequence, f"match changed its block table from {before} to {sequence.block_table}")
        return found

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        table, before = sequence.block_table, self.tables.get(sequence, [])
        if table != before:
            self._fail(sequence, f"its block table is {table}, though it was given {before}")
        given = self.blocks.allocate(sequence, num_tokens)
        if not given:
            self.refused.append(RefusedBlocks.of(self.blocks, sequence, num_tokens))
            if table != before:
                self._fail(sequence, f"allocate returned False and changed its block table from {before} to {table}")
            return False
        if table[: len(before)] != before:
            self._fail(sequence, f"allocate changed the blocks that it had from {before} to {table}")
        total = sequence.num_computed_tokens + num_tokens
        if len(table) * self.block_size < total:
            self._fail(sequence, f"allocate gave {len(table)} blocks of {self.block_size} tokens for {total} tokens")
        if len(set(table)) < len(table) or not all(0 <= block < self.num_blocks for block in table):
            self._fail(sequence, f"its block table {table} has a block twice, or one that there is not")
        num_shared = len(before) or sequence.num_computed_tokens // self.block_size
        if taken := [block for block in table[num_shared:] if block in self.holders and block not in before]:
            self._fail(sequence, f"allocate gave it blocks {taken}, which another sequence holds and writes to")
        self._check_content(sequence, table[len(before) : num_shared], table[num_shared:])
        self.holders.update(table[len(before) :])
        self.tables[sequence] = list(table)
        self._check_free(sequence)
        return True

    def commit(self, sequence: Sequence) -> None:
        self.blocks.commit(sequence)
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        self.evictions.commit(sequence.block_table[self.num_committed.get(sequence, 0) : num_full])
        self.num_committed[sequence] = num_full
        self._check_free(sequence)

    def free(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.block_table or sequence.num_computed_tokens:
            self._fail(sequence, f"free left {sequence}, not an empty block table and no computed tokens")
        self.holders -= Counter(self.tables.pop(sequence, []))
        self.num_committed.pop(sequence, None)
        self._check_free(sequence)

    def _check_content(self, sequence: Sequence, shared: list[int], own: list[int]) -> None:
        """What a sequence got: blocks that hold its prefix, and those that it will fill."""
        if wrong := self.evictions.share(shared) or self.evictions.hand_out(own):
            self._fail(sequence, wrong)

    def _evicted(self, block: int) -> None:
        if wrong := self.evictions.evict(block):
            self._fail(None, wrong)
        if self.on_evict is not None:
            self.on_evict(block)

    def _check_free(self, sequence: Sequence) -> None:
        free, held = self.blocks.num_free_blocks, len(self.holders)
        if free + held != self.num_blocks:
            self._fail(sequence, f"{free} blocks are free and {held} held, which is not {self.num_blocks}")

    def _fail(self, sequence: Sequence | None, what: str) -> NoReturn:
        raise PluginError(_sentence(self.plugin, self.step, sequence, what))


class CheckedScheduler(Scheduler):
    """A scheduler whose batches are checked.

    Args:
        scheduler: to be checked, made with `blocks`.
        plugin: what errors call it.
        limits: its config.
        blocks: to see what it does with them.

    Attributes:
        unfinished: sequences by their ids.
        unreported: those that lost their blocks since the last batch.
        num_in_flight: batches that were scheduled and not yet updated.

    Raises:
        PluginError: from any call after which a promise of `Scheduler` does not hold.
    """

    def __init__(self, scheduler: Scheduler, plugin: str, limits: SchedulerConfig, blocks: CheckedBlockManager) -> None:
        self.scheduler = scheduler
        self.plugin = plugin
        self.limits = limits
        self.blocks = blocks
        self.unfinished: dict[str, Sequence] = {}
        self.unreported: set[Sequence] = set()
        self.num_in_flight = 0

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    def add(self, sequence: Sequence) -> None:
        self.unfinished[sequence.request_id] = sequence
        self.scheduler.add(sequence)
        self._check_counts()

    def abort(self, request_id: str) -> Sequence | None:
        expected = self.unfinished.pop(request_id, None)
        sequence = self.scheduler.abort(request_id)
        if sequence is not expected:
            self._fail(expected or sequence, f"abort returned {sequence}, not {expected}")
        if sequence is not None and sequence.block_table:
            self._fail(sequence, f"it was aborted and keeps blocks {sequence.block_table}")
        self._check_counts()
        return sequence

    def schedule(self) -> Batch | None:
        self.blocks.step += 1
        due = {s: s.num_uncomputed_tokens for s in self.unfinished.values()}
        computed = {s: s.num_computed_tokens for s in due if s.block_table}
        batch = self.scheduler.schedule()
        reason = self.scheduler.wait_reason()
        lost = {s for s in computed if not s.block_table}
        self.unreported |= lost
        if batch is None:
            if not self.num_in_flight and self.unfinished:
                self._fail(next(iter(due)), f"nothing runs, though {len(due)} sequences are unfinished")
            self._check_reasons(Batch(), reason, gave_way=bool(lost))
            return None
        self.num_in_flight += 1
        if not batch.sequences:
            self._fail(None, "the batch is empty; return None where nothing can run")
        for sequence, count in Counter(batch.sequences).items():
            if self.unfinished.get(sequence.request_id) is not sequence:
                self._fail(sequence, "it is in the batch, though it has ended or was never added")
            if count > 1:
                self._fail(sequence, f"it is in the batch {count} times")
        for index, sequence in enumerate(batch.sequences):
            self._check_entry(batch, index, due[sequence], computed.get(sequence))
        if len(batch.sequences) > self.limits.max_num_seqs:
            self._fail(None, f"{len(batch.sequences)} sequences are more than max_num_seqs={self.limits.max_num_seqs}")
        if batch.total_tokens > self.limits.budget:
            self._fail(
                batch.sequences[-1], f"with it the batch has {batch.total_tokens} tokens, more than "
                f"max_num_batched_tokens={self.limits.budget}"
            )  # fmt: skip
        if wrong := self.unreported ^ set(batch.preempted):
            self._fail(wrong.pop(), "Batch.preempted is not who lost its blocks since the last batch")
        self.unreported = set()
        self._check_counts()
        self._check_reasons(batch, reason, gave_way=bool(lost))
        self.blocks.refused.clear()
        return batch

    def wait_reason(self) -> WaitReason | None:
        return self.scheduler.wait_reason()

    def update(self, batch: Batch) -> list[Sequence]:
        self.num_in_flight -= 1
        expected = {s for s in batch.sequences if s.is_finished and self.unfinished.get(s.request_id) is s}
        ended = self.scheduler.update(batch)
        if len(ended) != len(set(ended)) or set(ended) != expected:
            wrong = (set(ended) ^ expected) or set(ended)
            self._fail(wrong.pop(), "update does not return, once each, those of the batch that ended with it")
        for sequence in ended:
            del self.unfinished[sequence.request_id]
            if sequence.block_table:
                self._fail(sequence, f"it ended and keeps blocks {sequence.block_table}")
        self._check_counts()
        return ended

    def _check_reasons(self, batch: Batch, reason: WaitReason | None, *, gave_way: bool) -> None:
        """Whether it is true what the scheduler says about those that wait, and those that lost their blocks."""
        waiting = [s.request_id for s in self.unfinished.values() if not s.block_table]
        untrue = untrue_wait(
            reason, waiting, self.blocks.refused, gave_way=gave_way,
            places_left=self.limits.max_num_seqs - len(self.unfinished) + len(waiting),
            budget_left=self.limits.budget - batch.total_tokens,
        )  # fmt: skip
        if untrue := untrue or untrue_preemptions(batch, self.blocks.refused):
            self._fail(None, untrue)

    def _check_entry(self, batch: Batch, index: int, due: int, computed: int | None) -> None:
        """One entry of a batch, given what was to compute and what was computed (None: no blocks) before it."""
        sequence, start, num_tokens = batch.sequences[index], batch.starts[index], batch.num_tokens[index]
        if due == 0:
            self._fail(
                sequence, "it is in the batch, though it has nothing to compute until its token in flight is there"
            )
        if computed is not None and start != computed:
            self._fail(sequence, f"its chunk starts at {start}, though {computed} tokens are computed")
        end = start + num_tokens
        if num_tokens < 1 or end > sequence.num_tokens - batch.samples[index]:
            self._fail(
                sequence, f"its chunk of {num_tokens} tokens from {start} on goes beyond its tokens, or is empty"
            )
        if len(sequence.block_table) * self.blocks.block_size < end:
            self._fail(
                sequence, f"it has {len(sequence.block_table)} blocks of {self.blocks.block_size} tokens, and its "
                f"chunk ends at {end}; call BlockManager.allocate first"
            )  # fmt: skip
        decodes = due == 1 and computed is not None and sequence.num_output_tokens - batch.samples[index] > 0
        if decodes and index >= batch.num_decodes:
            self._fail(sequence, "it decodes and comes after longer chunks in the batch")

    def _check_counts(self) -> None:
        holding = sum(bool(s.block_table) for s in self.unfinished.values())
        found, expected = (self.num_running, self.num_waiting), (holding, len(self.unfinished) - holding)
        if found != expected:
            self._fail(None, f"(num_running, num_waiting) is {found}, and (with, without blocks) {expected}")
        if holding > self.limits.max_num_seqs:
            self._fail(None, f"{holding} sequences hold blocks, more than max_num_seqs={self.limits.max_num_seqs}")

    def _fail(self, sequence: Sequence | None, what: str) -> NoReturn:
        raise PluginError(_sentence(self.plugin, self.blocks.step, sequence, what))


def _sentence(plugin: str, step: int, sequence: Sequence | None, what: str) -> str:
    about = "" if sequence is None else f" with sequence {sequence.request_id!r}"
    return f"{plugin} broke its contract in step {step}{about}: {what}."
