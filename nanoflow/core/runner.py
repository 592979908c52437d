"""From a batch to sampled tokens: owns the buffers that mirror running sequences, and knows no policy.

A running sequence has a row in these buffers. Each step writes only what changed in a row (new block ids), and builds
the rest with array operations. The last token that a row sampled stays on the device, so that the next step can be
submitted before the host has seen its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.graphs import DecodeGraphs
from nanoflow.core.interfaces import AttentionBackend, ModelArch
from nanoflow.core.sampler import Sampler, SamplingInput
from nanoflow.core.types import AttentionInput, Batch, Sequence


@dataclass(slots=True)
class PendingStep:
    """A submitted step. `result` waits for it."""

    tokens_S: torch.Tensor  # on the host once `done`
    done: torch.cuda.Event | None

    def result(self) -> list[int]:
        """A token id for each sequence that samples, in the order of the batch. Blocks until the device is there."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens_S.tolist()


class ModelRunner:
    """Runs batches on one device, in the order in which they are submitted.

    Args:
        model: weights loaded.
        attention: its cache allocated.
        device: where they are.
        block_size: P.
        max_num_seqs: most sequences in a batch, and most that hold blocks.
        max_model_len: most tokens in a sequence.

    Attributes:
        graphs: replays batches in which every sequence decodes; None runs them like all others.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, *, device: torch.device, block_size: int,
        max_num_seqs: int, max_model_len: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.attention = attention
        self.sampler = Sampler()
        self.device = device
        self.block_size = block_size
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = [0] * max_num_seqs  # entries of each row of `block_tables` that are in force
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.zeros(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.int64)
        self.min_len = np.zeros(max_num_seqs, np.int64)  # no stop token before so many tokens, prompt included
        self.plain = np.zeros(max_num_seqs, bool)  # sampling needs no filter
        self.params_changed = False
        self.feeds_back = np.zeros(max_num_seqs, bool)  # the row's newest token is in `last_token`
        self.last_token = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)  # one for padding rows
        self.graphs: DecodeGraphs | None = None

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's row to others; nothing happens if it has none."""
        if sequence.row >= 0:
            self.num_blocks[sequence.row] = 0
            self.feeds_back[sequence.row] = False
            self.free_rows.append(sequence.row)
            sequence.row = -1

    @torch.inference_mode()
    def capture(self, sizes: list[int], padding_block: int) -> None:
        """Capture decode steps of these batch sizes; `padding_block` is a block of the cache that is nobody's."""
        self.graphs = DecodeGraphs(
            self.model,
            self.attention,
            self.last_token,
            max_blocks=self.block_tables.shape[1],
            block_size=self.block_size,
            padding_block=padding_block,
            sizes=sizes,
        )

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingStep:
        """Start a step. Returns at once on a GPU; on a CPU when it is done."""
        for sequence in batch.preempted:
            self.release(sequence)
        rows = self._update_rows(batch)
        if self.graphs is not None and batch.num_decodes == len(rows) and all(batch.samples):
            tokens_S = self._replay(self.graphs, batch, rows)
        else:
            tokens_S = self._run(batch, rows)
        self.feeds_back[rows] = batch.samples
        return self._pending(tokens_S)

    def _run(self, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        """Tokens of the sequences that sample."""
        hidden_TD, query_start = self._forward(batch, rows)
        sampling = np.flatnonzero(batch.samples)
        last_S = self._to_device(query_start[1:][sampling] - 1)
        logits_SV = self.model.compute_logits(hidden_TD[last_S])
        tokens_S = self.sampler(logits_SV, self._sampling_input(batch, sampling, rows[sampling]))
        self.last_token[self._to_device(rows[sampling])] = tokens_S
        return tokens_S

    def _forward(self, batch: Batch, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Hidden states [T, D], and where each sequence's tokens start, int32 [S + 1]."""
        starts = np.array(batch.starts)
        query_lens = np.array(batch.num_tokens)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(query_lens, out=query_start[1:])
        first = query_start[:-1]
        positions = np.arange(query_start[-1]) + np.repeat(starts - first, query_lens)
        block_tables = self.block_tables[rows, : -(-int((starts + query_lens).max()) // self.block_size)]
        blocks = block_tables[np.repeat(np.arange(len(rows)), query_lens), positions // self.block_size]
        self.attention.plan(
            AttentionInput(
                slot_mapping_T=self._to_device(blocks.astype(np.int64) * self.block_size + positions % self.block_size),
                query_start_S1=self._to_device(query_start),
                context_lens_S=self._to_device((starts + query_lens).astype(np.int32)),
                block_tables_SB=self._to_device(block_tables),
                query_lens=query_lens,
                context_lens=starts + query_lens,
                num_decodes=batch.num_decodes,
            )
        )
        input_ids_T = self._input_ids(batch, rows, query_start)
        return self.model.forward(input_ids_T, self._to_device(positions), self.attention), query_start

    def _replay(self, graphs: DecodeGraphs, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        """Tokens of a batch in which every sequence decodes and samples."""
        fresh = np.flatnonzero(~self.feeds_back[rows])  # their newest token was not sampled in their row
        if len(fresh):
            known = np.array([batch.sequences[index].token_ids[batch.starts[index]] for index in fresh])
            self.last_token[self._to_device(rows[fresh])] = self._to_device(known)
        if self.params_changed:
            graphs.set_params(self.temperature, self.seed)
            self.params_changed = False
        starts = np.array(batch.starts)
        capture = graphs.replay(rows, starts)
        if self.plain[rows].all() and (starts + 1 >= self.min_len[rows]).all():
            return capture.tokens_S[: len(rows)]
        inputs = self._sampling_input(batch, np.arange(len(rows)), rows)
        tokens_S = self.sampler(capture.logits_SV[: len(rows)], inputs)
        self.last_token[self._to_device(rows)] = tokens_S
        return tokens_S

    def _update_rows(self, batch: Batch) -> np.ndarray:
        """Rows of the batch's sequences, int64 [S], their block tables brought up to date."""
        rows = np.empty(len(batch.sequences), np.int64)
        for index, sequence in enumerate(batch.sequences):
            if sequence.row < 0:
                self._assign_row(sequence)
            row = rows[index] = sequence.row
            known, table = self.num_blocks[row], sequence.block_table
            if known < len(table):
                self.block_tables[row, known : len(table)] = table[known:]
                self.num_blocks[row] = len(table)
                if self.graphs is not None:
                    self.graphs.set_blocks(row, known, table[known:])
        return rows

    def _assign_row(self, sequence: Sequence) -> None:
        row = sequence.row = self.free_rows.pop()
        params = sequence.params
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.temperature[row] = np.clip(params.temperature, 1e-6, 1e6) if params.temperature > 0 else 0
        self.top_k[row] = min(params.top_k, self.model.vocab_size) if params.top_k > 0 else self.model.vocab_size
        self.top_p[row] = max(params.top_p, 1e-30)
        self.min_p[row] = params.min_p
        self.seed[row] = sequence.seed
        self.min_len[row] = sequence.num_prompt_tokens + params.min_tokens
        self.plain[row] = params.top_k <= 0 and params.top_p == 1 and params.min_p == 0
        self.params_changed = True

    def _input_ids(self, batch: Batch, rows: np.ndarray, query_start: np.ndarray) -> torch.Tensor:
        """Token ids [T]: known values from the host, the others from the rows' last tokens on the device."""
        token_ids: list[int] = []
        in_flight: list[int] = []
        for index, (sequence, start, num_tokens) in enumerate(
            zip(batch.sequences, batch.starts, batch.num_tokens, strict=True)
        ):
            end = start + num_tokens
            token_ids += sequence.token_ids[start:end]
            if end > len(sequence.token_ids):
                token_ids.append(0)
                in_flight.append(index)
        input_ids_T = self._to_device(np.array(token_ids))
        if in_flight:
            places = self._to_device(query_start[1:][in_flight] - 1)
            input_ids_T[places] = self.last_token[self._to_device(rows[in_flight])]
        return input_ids_T

    def _sampling_input(self, batch: Batch, sampling: np.ndarray, rows: np.ndarray) -> SamplingInput:
        """Parameters of the rows that sample; a stop token is forbidden before `min_tokens`."""
        position = np.array(batch.starts)[sampling] + np.array(batch.num_tokens)[sampling]
        early = np.flatnonzero(position < self.min_len[rows]).tolist()
        forbidden = {row: list(batch.sequences[sampling[row]].stop_token_ids) for row in early}
        return SamplingInput(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            position=position,
            forbidden=forbidden,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _pending(self, tokens_S: torch.Tensor) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(tokens_S, None)
        host = torch.empty(tokens_S.shape, dtype=tokens_S.dtype, pin_memory=True)
        host.copy_(tokens_S, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingStep(host, done)
