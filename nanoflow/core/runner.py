"""From a batch to sampled tokens: owns the buffers that mirror running sequences, and knows no policy.

A running sequence has a row in these buffers. Each step writes only what changed in a row (new block ids), and builds
the rest with array operations. The last token that a row sampled stays on the device, so that the next step can be
submitted before the host has seen its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from nanoflow.core.graphs import Capture, RowState, StepGraphs, gather_rows
from nanoflow.core.interfaces import AttentionBackend, ModelArch
from nanoflow.core.sampler import Sampler, SamplingInput
from nanoflow.core.step import BlockTables, StepBuffer, fill
from nanoflow.core.structured import TokenMasks
from nanoflow.core.transfer import to_device
from nanoflow.core.types import AttentionInput, Batch, Sequence


@dataclass(slots=True)
class PendingStep:
    """A submitted step. `result` waits for it."""

    tokens_S: torch.Tensor  # on the host once `done`
    samples: list[bool]  # which of them count
    done: torch.cuda.Event | None

    def result(self) -> list[int]:
        """A token id for each sequence that samples, in the order of the batch. Blocks until the device is there."""
        if self.done is not None:
            self.done.synchronize()
        return list(compress(self.tokens_S.tolist(), self.samples))


class ModelRunner:
    """Runs batches on one device, in the order in which they are submitted.

    Args:
        model: weights loaded.
        attention: its cache allocated.
        device: where they are.
        block_size: P.
        max_num_seqs: most sequences in a batch, and most that hold blocks.
        max_model_len: most tokens in a sequence.
        padding_block: a block of the cache that is nobody's; captured steps write there what is padding.

    Attributes:
        graphs: replays steps that it has a graph for; None runs all of them kernel by kernel.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, *, device: torch.device, block_size: int,
        max_num_seqs: int, max_model_len: int, padding_block: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.attention = attention
        self.sampler = Sampler()
        self.device = device
        self.block_size = block_size
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.tables = BlockTables(max_num_seqs, -(-max_model_len // block_size), padding_block, device)
        num_rows = max_num_seqs + 1  # one for padding
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.min_len = np.zeros(num_rows, np.int64)  # no stop token before so many tokens, prompt included
        self.plain = np.zeros(num_rows, bool)  # sampling needs no filter
        self.has_grammar = np.zeros(num_rows, bool)
        self.params_changed = False
        self.rows = RowState(
            block_tables_RB=self.tables.on_device,
            last_token_R=torch.zeros(num_rows, dtype=torch.int64, device=device),
            temperature_R=torch.from_numpy(self.temperature).to(device),
            seed_R=torch.from_numpy(self.seed).to(device),
        )
        self.graphs: StepGraphs | None = None

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's row to others; nothing happens if it has none."""
        if sequence.row >= 0:
            self.tables.clear(sequence.row)
            self.free_rows.append(sequence.row)
            sequence.row = -1

    @torch.inference_mode()
    def capture(self, decodes: list[int], tokens: list[int]) -> None:
        """Capture decode steps of these batch sizes, and other steps of these numbers of tokens."""
        self.graphs = StepGraphs(
            self.model, self.attention, self.rows, block_size=self.block_size, decodes=decodes, tokens=tokens
        )

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingStep:
        """Start a step. Returns at once on a GPU; on a CPU when it is done."""
        for sequence in batch.preempted:
            self.release(sequence)
        rows, any_new = self._update_rows(batch)
        num_tokens, num_seqs = batch.total_tokens, len(rows)
        settled = num_tokens == num_seqs and not any_new
        capture = self.graphs.find(num_tokens, num_seqs, settled=settled) if self.graphs is not None else None
        if capture is not None:
            num_tokens, num_seqs = capture.buffer.num_tokens, capture.buffer.num_seqs
        step = StepBuffer(num_tokens, num_seqs, torch.device("cpu"), pinned=self.device.type == "cuda")
        fill(step.arrays, batch, rows, self.tables.on_host, self.block_size, settled=settled)
        if capture is not None:
            tokens_S, samples = self._replay(capture, step, batch, rows), batch.samples
        else:
            tokens_S, samples = self._run(step, batch, rows, settled), [True] * sum(batch.samples)
        return self._pending(tokens_S, samples)

    def _run(self, step: StepBuffer, batch: Batch, rows: np.ndarray, settled: bool) -> torch.Tensor:
        """Tokens of the sequences that sample."""
        hidden_TD = self._forward(step, batch, settled)
        sampling = np.flatnonzero(batch.samples)
        last_S = to_device(step.arrays.query_start_S1[1:][sampling].astype(np.int64) - 1, self.device)
        logits_SV = self.model.compute_logits(hidden_TD[last_S])
        tokens_S = self.sampler(logits_SV, self._sampling_input(batch, sampling, rows[sampling]))
        self.rows.last_token_R[to_device(rows[sampling], self.device)] = tokens_S
        return tokens_S

    def _forward(self, host: StepBuffer, batch: Batch, settled: bool) -> torch.Tensor:
        """Hidden states [T, D]."""
        buffer = host
        if self.device.type == "cuda":
            buffer = StepBuffer(host.num_tokens, host.num_seqs, self.device)
            buffer.memory.copy_(host.memory, non_blocking=True)
        step = buffer.tensors
        context_lens = host.arrays.context_lens_S.astype(np.int64)
        width = -(-int(context_lens.max()) // self.block_size)
        inputs = AttentionInput(
            slot_mapping_T=step.slots_T,
            query_start_S1=step.query_start_S1,
            context_lens_S=step.context_lens_S,
            block_tables_SB=self.rows.block_tables_RB.new_zeros(host.num_seqs, width),
            query_lens=np.array(batch.num_tokens),
            context_lens=context_lens,
            num_decodes=batch.num_decodes,
            settled=settled,
        )
        ids_T = gather_rows(self.rows, step, self.block_size, inputs.block_tables_SB)[0]
        self.attention.plan(inputs)
        return self.model.forward(ids_T, step.positions_T, self.attention)

    def _replay(self, capture: Capture, step: StepBuffer, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        """Tokens of all sequences."""
        assert self.graphs is not None
        self.graphs.replay(capture, step)
        position = step.arrays.context_lens_S[: len(rows)]
        if self.plain[rows].all() and (position >= self.min_len[rows]).all():
            return capture.tokens_S[: len(rows)]
        # Some row needs more than a plain draw: draw again for all of them.
        tokens_S = self.sampler(capture.logits_SV[: len(rows)], self._sampling_input(batch, np.arange(len(rows)), rows))
        self.rows.last_token_R[capture.buffer.tensors.targets_S[: len(rows)]] = tokens_S
        return tokens_S

    def _update_rows(self, batch: Batch) -> tuple[np.ndarray, bool]:
        """Rows of the batch's sequences, int64 [S], brought up to date, and whether any sequence had none before."""
        rows = np.empty(len(batch.sequences), np.int64)
        any_new = False
        for index, sequence in enumerate(batch.sequences):
            if sequence.row < 0:
                self._assign_row(sequence)
                any_new = True
            rows[index] = sequence.row
            self.tables.update(sequence.row, sequence.block_table)
        self.tables.send()
        if self.params_changed and self.device.type == "cuda":
            self.rows.temperature_R.copy_(to_device(self.temperature, self.device))
            self.rows.seed_R.copy_(to_device(self.seed, self.device))
        self.params_changed = False
        return rows, any_new

    def _assign_row(self, sequence: Sequence) -> None:
        row = sequence.row = self.free_rows.pop()
        params = sequence.params
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.temperature[row] = np.clip(params.temperature, 1e-6, 1e6) if params.temperature > 0 else 0
        self.top_k[row] = min(params.top_k, self.model.vocab_size) if params.top_k > 0 else self.model.vocab_size
        self.top_p[row] = max(params.top_p, 1e-30)
        self.min_p[row] = params.min_p
        self.seed[row] = sequence.seed
        self.min_len[row] = sequence.num_prompt_tokens + params.min_tokens if params.min_tokens else 0
        self.has_grammar[row] = sequence.grammar is not None
        self.plain[row] = params.top_k <= 0 and params.top_p == 1 and params.min_p == 0 and sequence.grammar is None
        self.params_changed = True

    def _sampling_input(self, batch: Batch, sampling: np.ndarray, rows: np.ndarray) -> SamplingInput:
        """Parameters of the rows that sample; a stop token is forbidden before `min_tokens`."""
        position = np.array(batch.starts)[sampling] + np.array(batch.num_tokens)[sampling]
        is_early, has_grammar = position < self.min_len[rows], self.has_grammar[rows]
        early = np.flatnonzero(is_early & ~has_grammar).tolist()
        forbidden = [(row, token) for row in early for token in batch.sequences[sampling[row]].stop_token_ids]
        return SamplingInput(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            position=position,
            forbidden=forbidden,
            masks=self._masks(batch, sampling, is_early, has_grammar) if has_grammar.any() else None,
        )

    def _masks(
        self, batch: Batch, sampling: np.ndarray, is_early: np.ndarray, has_grammar: np.ndarray
    ) -> TokenMasks | None:
        """What the grammars of the rows that sample allow now; the scheduler left out those that wait for a value."""
        masks = TokenMasks([], [])
        for row in np.flatnonzero(has_grammar & np.array(batch.samples)[sampling]).tolist():
            grammar = batch.sequences[sampling[row]].grammar
            assert grammar is not None
            masks.rows.append(row)
            masks.words.append(grammar.mask(is_early=bool(is_early[row])))
        return masks if masks.rows else None

    def _pending(self, tokens_S: torch.Tensor, samples: list[bool]) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(tokens_S, samples, None)
        host = torch.empty(tokens_S.shape, dtype=tokens_S.dtype, pin_memory=True)
        host.copy_(tokens_S, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingStep(host, samples, done)
