"""From a batch to the arrays of a step, and the block tables of all slots, of which only changes are sent."""

from __future__ import annotations

import numpy as np
import torch

from nanoflow.core.data.batch import Batch
from nanoflow.core.data.transfer import to_device
from nanoflow.core.execution.step_buffer import StepInput


class BlockTables:
    """The block table of each row, on the host and on the device, where only changes are sent.

    Args:
        num_rows: rows of sequences; one more is the padding row.
        width: most blocks in a row.
        padding_block: what the padding row is filled with.
        device: where `on_device` lives.

    Attributes:
        on_host: int32 numpy array [rows + 1, B].
        on_device: the same as a tensor, up to date after `apply`.
    """

    def __init__(self, num_rows: int, width: int, padding_block: int, device: torch.device) -> None:
        self.on_host = np.zeros((num_rows + 1, width), np.int32)
        self.on_host[-1] = padding_block
        self.lengths = [0] * num_rows  # entries of each row that are in force
        # On a CPU both are the same memory.
        self.on_device = torch.from_numpy(self.on_host).to(device)
        self.changes: list[tuple[int, int, list[int]]] = []

    def update(self, row: int, blocks: list[int]) -> None:
        """The row's table is now `blocks`, of which the first are as they were."""
        known = self.lengths[row]
        if known < len(blocks):
            self.on_host[row, known : len(blocks)] = blocks[known:]
            self.changes.append((row, known, blocks[known:]))
            self.lengths[row] = len(blocks)

    def clear(self, row: int) -> None:
        """The row is somebody else's from now on."""
        self.lengths[row] = 0

    def take_changes(self) -> np.ndarray:
        """What changed since it was last asked: places in the flat table and their entries, int64 [2, C]."""
        if not self.changes:
            return np.empty((2, 0), np.int64)
        width = self.on_host.shape[1]
        places = np.concatenate([row * width + first + np.arange(len(new)) for row, first, new in self.changes])
        self.changes.clear()
        return np.stack((places, self.on_host.reshape(-1)[places]))

    def apply(self, changes_2C: np.ndarray) -> None:
        """Bring `on_device` up to date."""
        if changes_2C.size:
            places, entries = to_device(changes_2C, self.on_device.device)
            self.on_device.view(-1).index_copy_(0, places, entries.int())


def fill(
    step: StepInput, batch: Batch, rows: np.ndarray, tables: np.ndarray, block_size: int, *, uniform_decode: bool
) -> None:
    """Write a batch into the arrays of a step that may be larger; what is left over is padding.

    Left-over sequences are of the padding row, which is the last in `tables`. In a uniform decode step each of them
    has one token; otherwise the first of them has all left-over tokens, as a prompt of its own would, and the rest have
    none.

    Args:
        step: arrays on the host.
        batch: what to compute.
        rows: int64 [S]; rows of the batch's sequences.
        tables: int32 [rows + 1, B]; their block tables.
        block_size: P.
        uniform_decode: as in `AttentionInput`.
    """
    padding_row, num_seqs = len(tables) - 1, len(rows)
    lens, starts = np.array(batch.num_tokens), np.array(batch.starts)
    num_tokens = int(lens.sum())
    spare_tokens, spare_seqs = len(step.token_ids_T) - num_tokens, len(step.rows_S) - num_seqs
    spare_lens = np.zeros(spare_seqs, np.int64)
    if uniform_decode:
        spare_lens[:] = 1
    elif spare_tokens:
        spare_lens[0] = spare_tokens
    step.rows_S[:num_seqs], step.rows_S[num_seqs:] = rows, padding_row
    step.targets_S[:num_seqs], step.targets_S[num_seqs:] = np.where(batch.samples, rows, padding_row), padding_row
    all_lens, all_starts = np.concatenate((lens, spare_lens)), np.concatenate((starts, np.zeros_like(spare_lens)))
    step.query_start_S1[0] = 0
    np.cumsum(all_lens, out=step.query_start_S1[1:])
    step.context_lens_S[:] = np.maximum(all_starts + all_lens, 1)
    first = step.query_start_S1[:-1]
    np.add(np.arange(len(step.token_ids_T)), np.repeat(all_starts - first, all_lens), out=step.positions_T)
    blocks = tables[np.repeat(step.rows_S, all_lens), step.positions_T // block_size].astype(np.int64)
    np.add(blocks * block_size, step.positions_T % block_size, out=step.slots_T)
    step.token_ids_T[:num_tokens], step.token_ids_T[num_tokens:] = _token_ids(batch, rows), 0


def _token_ids(batch: Batch, rows: np.ndarray) -> list[int]:
    """Known values, and for those in flight the row that samples them."""
    token_ids: list[int] = []
    for sequence, start, count, row in zip(batch.sequences, batch.starts, batch.num_tokens, rows.tolist(), strict=True):
        token_ids += sequence.token_ids[start : start + count]
        if start + count > len(sequence.token_ids):
            token_ids.append(-1 - row)
    return token_ids
