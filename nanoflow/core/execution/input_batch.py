"""Running sequences by slot, on the host: who has which slot, their block tables, what of them the device must be told;
and from a batch to the arrays of a step."""

from __future__ import annotations

import numpy as np

from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.execution.step_buffer import StepInput
from nanoflow.core.sampling.batch_sampler import BatchSampler

NOTHING_2C, NOTHING_3C = np.empty((2, 0), np.int64), np.empty((3, 0), np.int64)


class BlockTables:
    """The block table of each slot, on the host.

    Args:
        num_slots: slots of sequences; one more is the padding slot.
        width: most blocks in a table.
        padding_block: what the padding slot's is filled with.

    Attributes:
        blocks_RB: int32 numpy array [slots + 1, B].
    """

    def __init__(self, num_slots: int, width: int, padding_block: int) -> None:
        self.blocks_RB = np.zeros((num_slots + 1, width), np.int32)
        self.blocks_RB[-1] = padding_block
        self.lengths = [0] * num_slots  # entries of each table that are in force
        self.changes: list[tuple[int, int, int]] = []  # slot, first and end of the entries

    def update(self, slot: int, blocks: list[int]) -> None:
        """The slot's table is now `blocks`, of which the first are as they were."""
        known, count = self.lengths[slot], len(blocks)
        if known < count:
            self.blocks_RB[slot, known:count] = blocks[known:]
            self.changes.append((slot, known, count))
            self.lengths[slot] = count

    def clear(self, slot: int) -> None:
        """The slot is somebody else's from now on."""
        self.lengths[slot] = 0

    def take_changes(self) -> np.ndarray:
        """What changed since it was last asked: places in the flat tables and their blocks, int64 [2, C]."""
        if not self.changes:
            return NOTHING_2C
        width = self.blocks_RB.shape[1]
        places = np.concatenate(
            [np.arange(slot * width + first, slot * width + end) for slot, first, end in self.changes]
        )
        self.changes.clear()
        return np.stack((places, self.blocks_RB.reshape(-1)[places]))


class InputBatch:
    """Running sequences by slot.

    Args:
        max_num_seqs: slots.
        width: most blocks of a sequence.
        padding_block: as in `BlockTables`.
        sampler: is told whose a slot is.

    Attributes:
        free_slots: those that are nobody's.
        num_scored: sequences that want log-probabilities of their prompts.
    """

    def __init__(self, max_num_seqs: int, width: int, padding_block: int, sampler: BatchSampler) -> None:
        self.free_slots = list(reversed(range(max_num_seqs)))
        self.tables = BlockTables(max_num_seqs, width, padding_block)
        self.sampler = sampler
        self.num_scored = 0

    def update(self, batch: Batch) -> tuple[np.ndarray, bool]:
        """Slots of the batch's sequences, int64 [S], brought up to date; and whether any had none before."""
        for sequence in batch.preempted:
            self.release(sequence)
        slots = np.empty(len(batch.sequences), np.int64)
        any_new = False
        for index, sequence in enumerate(batch.sequences):
            if sequence.slot < 0:
                self._assign(sequence)
                any_new = True
            slots[index] = sequence.slot
            self.tables.update(sequence.slot, sequence.block_table)
        return slots, any_new

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's slot to others; nothing happens if it has none."""
        if sequence.slot >= 0:
            self.tables.clear(sequence.slot)
            self.sampler.release(sequence.slot)
            self.free_slots.append(sequence.slot)
            self.num_scored -= sequence.params.prompt_logprobs is not None
            sequence.slot = -1

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """What changed in block tables and sampling parameters since it was last asked, as in `StepMessage`."""
        changed = self.sampler.take_changed()
        if not changed:
            return self.tables.take_changes(), NOTHING_3C
        slots = np.array(changed, np.int64)
        temperature, seed = self.sampler.temperature[slots], self.sampler.seed[slots]
        return self.tables.take_changes(), np.stack((slots, temperature.astype(np.float64).view(np.int64), seed))

    def _assign(self, sequence: Sequence) -> None:
        sequence.slot = self.free_slots.pop()
        self.sampler.assign(sequence.slot, sequence)
        self.num_scored += sequence.params.prompt_logprobs is not None


def fill(
    step: StepInput, batch: Batch, slots: np.ndarray, tables_RB: np.ndarray, block_size: int, *, uniform_decode: bool
) -> None:
    """Write a batch into the arrays of a step that may be larger; what is left over is padding.

    Left-over sequences are of the padding slot, which is the last in `tables_RB`. In a uniform decode step each of them
    has one token; otherwise the first of them has all left-over tokens, as a prompt of its own would, and the rest have
    none.

    Args:
        step: arrays on the host.
        batch: what to compute.
        slots: int64 [S]; slots of the batch's sequences.
        tables_RB: int32 [slots + 1, B]; their block tables.
        block_size: P.
        uniform_decode: as in `AttentionInput`.
    """
    padding_slot, num_seqs = len(tables_RB) - 1, len(slots)
    lens, starts = np.array(batch.num_tokens), np.array(batch.starts)
    num_tokens = int(lens.sum())
    spare_tokens, spare_seqs = len(step.token_ids_T) - num_tokens, len(step.slots_S) - num_seqs
    spare_lens = np.zeros(spare_seqs, np.int64)
    if uniform_decode:
        spare_lens[:] = 1
    elif spare_tokens:
        spare_lens[0] = spare_tokens
    step.slots_S[:num_seqs], step.slots_S[num_seqs:] = slots, padding_slot
    step.targets_S[:num_seqs], step.targets_S[num_seqs:] = np.where(batch.samples, slots, padding_slot), padding_slot
    all_lens, all_starts = np.concatenate((lens, spare_lens)), np.concatenate((starts, np.zeros_like(spare_lens)))
    step.query_start_S1[0] = 0
    np.cumsum(all_lens, out=step.query_start_S1[1:])
    step.context_lens_S[:] = np.maximum(all_starts + all_lens, 1)
    first = step.query_start_S1[:-1]
    np.add(np.arange(len(step.token_ids_T)), np.repeat(all_starts - first, all_lens), out=step.positions_T)
    blocks = tables_RB[np.repeat(step.slots_S, all_lens), step.positions_T // block_size].astype(np.int64)
    np.add(blocks * block_size, step.positions_T % block_size, out=step.slot_mapping_T)
    step.token_ids_T[:num_tokens], step.token_ids_T[num_tokens:] = _token_ids(batch, slots), 0


def _token_ids(batch: Batch, slots: np.ndarray) -> list[int]:
    """Known values, and for those in flight the slot that samples them."""
    token_ids: list[int] = []
    for sequence, start, count, slot in zip(
        batch.sequences, batch.starts, batch.num_tokens, slots.tolist(), strict=True
    ):
        token_ids += sequence.token_ids[start : start + count]
        if start + count > len(sequence.token_ids):
            token_ids.append(-1 - slot)
    return token_ids
