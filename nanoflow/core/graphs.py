"""Decode steps as CUDA graphs: one a batch-size bucket, from the rows' last tokens to their next ones.

A captured step reads and writes fixed addresses, so what it needs lives on the device, by row: block tables, sampling
parameters, last tokens. The host says which rows decode, and at which positions; the sampler leaves each row's token
where the next step's input is read. So a whole step is one launch, and the host need not know the tokens to submit the
next one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.interfaces import AttentionBackend, ModelArch
from nanoflow.core.sampler import sample
from nanoflow.core.types import AttentionInput


def default_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: fine where a padded row costs most, up to `max_num_seqs`."""
    sizes = [1, 2, 4, 8, *range(16, 129, 16), *range(160, 257, 32), *range(320, 1025, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass(slots=True)
class Capture:
    """One captured step of S rows and its fixed tensors.

    Attributes:
        inputs_2S: int64; rows, and the positions of their newest tokens.
        inputs: what the attention backend planned with; kept, since the graph writes to its tensors.
        logits_SV: for rows that need more than a plain draw.
        tokens_S: int64; the plain draw, also written to `last_token`.
    """

    graph: torch.cuda.CUDAGraph
    inputs_2S: torch.Tensor
    inputs: AttentionInput
    logits_SV: torch.Tensor
    tokens_S: torch.Tensor


class DecodeGraphs:
    """Captures decode steps when it is made, and replays the smallest that a batch fits into.

    Args:
        model, attention: as in `ModelRunner`; the backend is `capturable`, and its cache has one block more than the
            block manager hands out, the last, where padding rows write.
        last_token: int64, one entry more than there are rows: the last is the padding row's.
        max_blocks: longest block table.
        block_size: P.
        padding_block: id of the block that padding rows write to.
        sizes: batch sizes to capture, rising.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, last_token: torch.Tensor, *, max_blocks: int,
        block_size: int, padding_block: int, sizes: list[int],
    ) -> None:  # fmt: skip
        self.model = model
        self.attention = attention
        self.last_token = last_token
        self.block_size = block_size
        self.padding_row = len(last_token) - 1
        self.sizes = sizes
        place = {"device": last_token.device}
        self.block_tables = torch.full((len(last_token), max_blocks), padding_block, dtype=torch.int32, **place)
        self.temperature = torch.zeros(len(last_token), dtype=torch.float32, **place)
        self.seed = torch.zeros(len(last_token), dtype=torch.int64, **place)
        self.pending: list[tuple[int, int, list[int]]] = []
        self.captures: dict[int, Capture] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            self.captures[size] = self._capture(size, pool)

    def set_blocks(self, row: int, start: int, blocks: list[int]) -> None:
        """Note that entries of the row's block table from `start` on are now `blocks`."""
        self.pending.append((row, start, blocks))

    def set_params(self, temperature: np.ndarray, seed: np.ndarray) -> None:
        """Take the rows' sampling parameters, all of them."""
        self.temperature[:-1].copy_(torch.from_numpy(temperature).pin_memory(), non_blocking=True)
        self.seed[:-1].copy_(torch.from_numpy(seed).pin_memory(), non_blocking=True)

    def replay(self, rows_S: np.ndarray, positions_S: np.ndarray) -> Capture:
        """Run a step; the first S entries of the result's tensors are those rows', until the next replay."""
        self._write_blocks()
        capture = self.captures[self.sizes[bisect_left(self.sizes, len(rows_S))]]
        inputs = torch.zeros(capture.inputs_2S.shape, dtype=torch.int64, pin_memory=True)
        filled = inputs.numpy()
        filled[0, : len(rows_S)], filled[0, len(rows_S) :] = rows_S, self.padding_row
        filled[1, : len(rows_S)] = positions_S
        capture.inputs_2S.copy_(inputs, non_blocking=True)
        capture.graph.replay()
        return capture

    def _write_blocks(self) -> None:
        if not self.pending:
            return
        width = self.block_tables.shape[1]
        places = np.concatenate([row * width + start + np.arange(len(blocks)) for row, start, blocks in self.pending])
        blocks = np.concatenate([blocks for _, _, blocks in self.pending])
        update = torch.from_numpy(np.stack((places, blocks))).pin_memory().to(self.last_token.device, non_blocking=True)
        self.block_tables.view(-1).index_copy_(0, update[0], update[1].to(torch.int32))
        self.pending.clear()

    def _capture(self, size: int, pool: tuple[int, int]) -> Capture:
        device, width = self.last_token.device, self.block_tables.shape[1]
        inputs_2S = torch.zeros(2, size, dtype=torch.int64, device=device)
        inputs_2S[0] = self.padding_row
        inputs = AttentionInput(
            slot_mapping_T=torch.zeros(size, dtype=torch.int64, device=device),
            query_start_S1=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens_S=torch.ones(size, dtype=torch.int32, device=device),
            block_tables_SB=torch.zeros(size, width, dtype=torch.int32, device=device),
            query_lens=np.ones(size, np.int64),
            context_lens=np.full(size, width * self.block_size),
            num_decodes=size,
        )
        self.attention.plan(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(inputs_2S, inputs)  # compiles kernels and sizes workspaces, which a capture can't
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_SV, tokens_S = self._step(inputs_2S, inputs)
        return Capture(graph, inputs_2S, inputs, logits_SV, tokens_S)

    def _step(self, inputs_2S: torch.Tensor, inputs: AttentionInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, V] and tokens [S] of one decode step; fills `inputs`, which the backend has planned with."""
        rows, positions = inputs_2S
        torch.index_select(self.block_tables, 0, rows, out=inputs.block_tables_SB)
        blocks = inputs.block_tables_SB.gather(1, (positions // self.block_size).unsqueeze(1)).squeeze(1)
        inputs.slot_mapping_T.copy_(blocks * self.block_size + positions % self.block_size)
        inputs.context_lens_S.copy_(positions + 1)
        hidden_SD = self.model.forward(self.last_token[rows], positions, self.attention)
        logits_SV = self.model.compute_logits(hidden_SD)
        tokens_S = sample(logits_SV, self.temperature[rows], self.seed[rows], positions + 1)
        self.last_token[rows] = tokens_S
        return logits_SV, tokens_S
