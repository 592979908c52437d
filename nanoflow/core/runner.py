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
from nanoflow.core.logprobs import Span, TopLogprobs, num_candidates, top_logprobs
from nanoflow.core.row_sampler import RowSampler
from nanoflow.core.step import BlockTables, StepBuffer, fill
from nanoflow.core.transfer import to_device
from nanoflow.core.types import AttentionInput, Batch, Sequence


@dataclass(slots=True)
class PendingStep:
    """A submitted step. `result` waits for it.

    Attributes:
        tokens_S: int64; on the host once `done`.
        samples: which of them count.
        logprobs: what sequences asked for beside their tokens; empty for none. To be read after `result`.
        done: None if it is done already.
    """

    tokens_S: torch.Tensor
    samples: list[bool]
    logprobs: list[TopLogprobs]
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
        self.device = device
        self.block_size = block_size
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.num_scored = 0  # rows whose sequences want log-probabilities of their prompts
        self.tables = BlockTables(max_num_seqs, -(-max_model_len // block_size), padding_block, device)
        num_rows = max_num_seqs + 1  # one for padding
        self.sampler = RowSampler(num_rows, model.vocab_size, device)
        self.params_changed = False
        self.rows = RowState(
            block_tables_RB=self.tables.on_device,
            last_token_R=torch.zeros(num_rows, dtype=torch.int64, device=device),
            temperature_R=torch.from_numpy(self.sampler.temperature).to(device),
            seed_R=torch.from_numpy(self.sampler.seed).to(device),
        )
        self.graphs: StepGraphs | None = None

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's row to others; nothing happens if it has none."""
        if sequence.row >= 0:
            self.tables.clear(sequence.row)
            self.free_rows.append(sequence.row)
            self.num_scored -= sequence.params.prompt_logprobs is not None
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
        spans = self._prompt_spans(batch)
        capture = None
        if self.graphs is not None and not spans:  # captured steps keep the logits of last tokens only
            capture = self.graphs.find(num_tokens, num_seqs, settled=settled)
        if capture is not None:
            step = self.graphs.open(capture)
        else:
            step = StepBuffer(num_tokens, num_seqs, torch.device("cpu"), pinned=self.device.type == "cuda")
        fill(step.arrays, batch, rows, self.tables.on_host, self.block_size, settled=settled)
        if capture is not None:
            return self._replay(capture, step, batch, rows)
        return self._run(step, batch, rows, spans, settled)

    def _run(
        self, step: StepBuffer, batch: Batch, rows: np.ndarray, spans: list[Span], settled: bool
    ) -> PendingStep:  # fmt: skip
        """Kernel by kernel."""
        hidden_TD = self._forward(step, batch, settled)
        logprobs = [self._prompt_logprobs(hidden_TD, step, batch, spans)] if spans else []
        sampling = np.flatnonzero(batch.samples)
        last_S = to_device(step.arrays.query_start_S1[1:][sampling].astype(np.int64) - 1, self.device)
        logits_SV = self.model.compute_logits(hidden_TD[last_S])
        drawing = self._drawing(step, batch, rows, sampling)
        tokens_S = self.sampler.draw(logits_SV, *drawing)
        self.rows.last_token_R[to_device(rows[sampling], self.device)] = tokens_S
        logprobs += self.sampler.logprobs(logits_SV, tokens_S, *drawing)
        return self._pending(tokens_S, [True] * len(sampling), logprobs)

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

    def _replay(self, capture: Capture, step: StepBuffer, batch: Batch, rows: np.ndarray) -> PendingStep:
        """As one graph, which draws for all rows as if they wanted no more than a plain draw."""
        assert self.graphs is not None
        on_host_S, done = self.graphs.replay(capture)
        count = len(rows)
        if self.sampler.plain[rows].all():
            return PendingStep(on_host_S[:count], batch.samples, [], done)
        logits_SV, tokens_S = capture.logits_SV[:count], capture.tokens_S[:count]
        again = self.sampler.beyond_plain(rows, step.arrays.context_lens_S[:count]) & batch.samples
        everyone = self._drawing(step, batch, rows, np.arange(count))
        if again.all():
            tokens_S = self.sampler.draw(logits_SV, *everyone)
        elif again.any():
            chosen = np.flatnonzero(again)
            place = to_device(chosen, self.device)
            tokens_S[place] = self.sampler.draw(logits_SV[place], *self._drawing(step, batch, rows, chosen))
        self.rows.last_token_R[capture.buffer.tensors.targets_S[:count]] = tokens_S
        logprobs = self.sampler.logprobs(logits_SV, tokens_S, *everyone, np.array(batch.samples))
        return self._pending(tokens_S, batch.samples, logprobs)

    def _drawing(
        self, step: StepBuffer, batch: Batch, rows: np.ndarray, chosen: np.ndarray
    ) -> tuple[list[Sequence], np.ndarray, np.ndarray]:  # fmt: skip
        """Sequences, rows, and positions of the tokens to be drawn, of those of the batch that are chosen."""
        position = step.arrays.context_lens_S[chosen].astype(np.int64)
        return [batch.sequences[index] for index in chosen.tolist()], rows[chosen], position

    def _prompt_spans(self, batch: Batch) -> list[Span]:
        """Prompt tokens whose log-probabilities this step brings: those after tokens that it computes."""
        if self.num_scored == 0:
            return []
        spans = []
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.num_tokens, strict=True):
            count = min(count, sequence.num_prompt_tokens - 1 - start)
            if count > 0 and sequence.needs_prompt_logits:
                wanted = num_candidates(sequence.params.prompt_logprobs, self.model.vocab_size)
                spans.append(Span(sequence, start + 1, count, wanted))
        return spans

    def _prompt_logprobs(
        self, hidden_TD: torch.Tensor, step: StepBuffer, batch: Batch, spans: list[Span]
    ) -> TopLogprobs:  # fmt: skip
        first = dict(zip(batch.sequences, step.arrays.query_start_S1.tolist(), strict=False))
        places = np.concatenate([first[span.sequence] + np.arange(span.num_tokens) for span in spans])
        token_ids = [i for s in spans for i in s.sequence.token_ids[s.position : s.position + s.num_tokens]]
        places_L, token_ids_L = to_device(np.stack((places, np.array(token_ids, np.int64))), self.device)
        return top_logprobs(spans, lambda part: self.model.compute_logits(hidden_TD[places_L[part]]), token_ids_L)

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
            self.rows.temperature_R.copy_(to_device(self.sampler.temperature, self.device))
            self.rows.seed_R.copy_(to_device(self.sampler.seed, self.device))
        self.params_changed = False
        return rows, any_new

    def _assign_row(self, sequence: Sequence) -> None:
        row = sequence.row = self.free_rows.pop()
        self.sampler.assign(row, sequence)
        self.num_scored += sequence.params.prompt_logprobs is not None
        self.params_changed = True

    def _pending(self, tokens_S: torch.Tensor, samples: list[bool], logprobs: list[TopLogprobs]) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(tokens_S, samples, logprobs, None)
        on_host = _to_host(tokens_S), samples, [part.map(_to_host) for part in logprobs]
        done = torch.cuda.Event()
        done.record()
        return PendingStep(*on_host, done)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there once the current stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
