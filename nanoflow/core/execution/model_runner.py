"""From a batch to sampled tokens: owns the buffers that mirror running sequences, and knows no policy.

A running sequence has a row in these buffers. Each step writes only what changed in a row (new block ids), and builds
the rest with array operations. The last token that a row sampled stays on the device, so that the next step can be
submitted before the host has seen its value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelArch
from nanoflow.core.data.batch import AttentionInput, Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution.cuda_graphs import Capture, CudaGraphs, SlotState, gather_step_inputs
from nanoflow.core.execution.input_batch import BlockTables, fill
from nanoflow.core.execution.step_buffer import StepBuffer
from nanoflow.core.execution.step_message import StepMessage
from nanoflow.core.ops import Ops
from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.logprobs import ROWS, Span, TopLogprobs, num_candidates, top_logprobs

POLL_SECONDS = 5e-5  # between looks at the device and at the other ranks


@dataclass(slots=True)
class PendingStep:
    """A submitted step. `result` waits for it.

    Attributes:
        tokens_S: int64; on the host once `done`.
        samples: which of them count.
        logprobs: what sequences asked for beside their tokens; empty for none. To be read after `result`.
        done: None if it is done already.
        rank_group: whose loss would make the step last for ever; None for a rank that is alone.
    """

    tokens_S: torch.Tensor
    samples: list[bool]
    logprobs: list[TopLogprobs]
    done: torch.cuda.Event | None
    rank_group: RankGroup | None

    def result(self) -> list[int]:
        """A token id for each sequence that samples, in the order of the batch. Blocks until the device is there.

        Raises:
            NanoflowError: another rank failed.
        """
        if self.done is not None:
            while self.rank_group is not None and not self.done.query():
                self.rank_group.check()
                time.sleep(POLL_SECONDS)
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
        rank_group: the ranks that share the model. All of them capture, and submit or `follow`, in the same order.
        ops: to compute with.

    Attributes:
        graphs: replays steps that it has a graph for; None runs all of them kernel by kernel.
        send: where other ranks, which `follow`, are told of each step; None if there are none, or they submit as well.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, *, device: torch.device, block_size: int,
        max_num_seqs: int, max_model_len: int, padding_block: int, rank_group: RankGroup, ops: Ops,
    ) -> None:  # fmt: skip
        self.ops = ops
        self.rank_group = rank_group
        self.send: Callable[[np.ndarray], None] | None = None
        self.model = model
        self.attention = attention
        self.device = device
        self.block_size = block_size
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.num_scored = 0  # rows whose sequences want log-probabilities of their prompts
        self.tables = BlockTables(max_num_seqs, -(-max_model_len // block_size), padding_block, device)
        self.padding_row = max_num_seqs
        num_rows = max_num_seqs + 1
        self.sampler = BatchSampler(num_rows, model.vocab_size, device, ops)
        self.params_changed = False
        self.rows = SlotState(
            block_tables_RB=self.tables.on_device,
            last_token_R=torch.zeros(num_rows, dtype=torch.int64, device=device),
            temperature_R=torch.from_numpy(self.sampler.temperature).to(device),
            seed_R=torch.from_numpy(self.sampler.seed).to(device),
        )
        self.graphs: CudaGraphs | None = None

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's row to others; nothing happens if it has none."""
        if sequence.slot >= 0:
            self.tables.clear(sequence.slot)
            self.free_rows.append(sequence.slot)
            self.num_scored -= sequence.params.prompt_logprobs is not None
            sequence.slot = -1

    @torch.inference_mode()
    def capture(self, decodes: list[int], tokens: list[int]) -> None:
        """Capture decode steps of these batch sizes, and other steps of these numbers of tokens."""
        self.graphs = CudaGraphs(
            self.model, self.attention, self.rows, self.rank_group.parallel, ops=self.ops,
            block_size=self.block_size, decodes=decodes, tokens=tokens,
        )  # fmt: skip

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingStep:
        """Start a step. Returns at once on a GPU; on a CPU when it is done.

        Raises:
            NanoflowError: another rank failed.
        """
        try:
            return self._submit(batch)
        except RuntimeError:  # such as of a sum that a rank was missing for
            self.rank_group.raise_if_rank_lost()
            raise

    def _submit(self, batch: Batch) -> PendingStep:
        for sequence in batch.preempted:
            self.release(sequence)
        rows, any_new, changes = self._update_rows(batch)
        num_tokens, num_seqs = batch.total_tokens, len(rows)
        uniform_decode = num_tokens == num_seqs and not any_new
        spans = self._prompt_spans(batch)
        capture = None
        if self.graphs is not None and not spans:  # captured steps keep the logits of last tokens only
            capture = self.graphs.find(num_tokens, num_seqs, uniform_decode=uniform_decode)
        if capture is not None:
            step = self.graphs.open(capture)
        else:
            step = StepBuffer(num_tokens, num_seqs, torch.device("cpu"), pinned=self.device.type == "cuda")
        fill(step.arrays, batch, rows, self.tables.on_host, self.block_size, uniform_decode=uniform_decode)
        scored_L = _scored(spans, batch, step)
        if self.send is not None:
            captured = capture is not None
            drawn_by_all = captured and bool(self.sampler.plain[rows].all())
            work = StepMessage(step, uniform_decode, captured, drawn_by_all, batch.num_decodes, scored_L, *changes)
            self.send(work.pack())
        if capture is not None:
            return self._replay(capture, step, batch, rows)
        return self._run(step, batch, rows, spans, scored_L, uniform_decode)

    @torch.inference_mode()
    def follow(self, message: bytes) -> None:
        """Compute beside rank 0 the step that it sent, whose tokens it leaves in this rank's rows, too."""
        work = StepMessage.unpack(message, pinned=self.device.type == "cuda")
        self._apply(work.tables_2C, work.params_2R)
        if work.captured:
            assert self.graphs is not None
            capture = self.graphs.find(work.step.num_tokens, work.step.num_seqs, uniform_decode=work.uniform_decode)
            assert capture is not None
            self.graphs.open(capture).memory.copy_(work.step.memory)
            self.graphs.replay(capture)
            if not work.drawn_by_all:
                self.rank_group.parallel.all_gather(capture.logits_SV)
        else:
            hidden_TD = self._forward(work.step, work.num_decodes, work.uniform_decode)
            for start in range(0, len(work.scored_L), ROWS):  # as `top_logprobs` asks for them
                self._logits(hidden_TD, work.scored_L[start : start + ROWS])
            arrays = work.step.arrays
            sampling = np.flatnonzero(arrays.targets_S != self.padding_row)
            self._logits(hidden_TD, arrays.query_start_S1[1:][sampling].astype(np.int64) - 1)
        if not work.drawn_by_all:
            self.rank_group.parallel.broadcast(self.rows.last_token_R)

    def _run(
        self, step: StepBuffer, batch: Batch, rows: np.ndarray, spans: list[Span], scored_L: np.ndarray,
        uniform_decode: bool,
    ) -> PendingStep:  # fmt: skip
        """Kernel by kernel."""
        hidden_TD = self._forward(step, batch.num_decodes, uniform_decode)
        logprobs = [self._prompt_logprobs(hidden_TD, spans, scored_L)] if spans else []
        sampling = np.flatnonzero(batch.samples)
        logits_SV = self._logits(hidden_TD, step.arrays.query_start_S1[1:][sampling].astype(np.int64) - 1)
        drawing = self._drawing(step, batch, rows, sampling)
        tokens_S = self.sampler.draw(logits_SV, *drawing)
        self.rows.last_token_R[to_device(rows[sampling], self.device)] = tokens_S
        self.rank_group.parallel.broadcast(self.rows.last_token_R)
        logprobs += self.sampler.logprobs(logits_SV, tokens_S, *drawing)
        return self._pending(tokens_S, [True] * len(sampling), logprobs)

    def _forward(self, host: StepBuffer, num_decodes: int, uniform_decode: bool) -> torch.Tensor:
        """Hidden states [T, D]. The step has no padding."""
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
            query_lens=np.diff(host.arrays.query_start_S1).astype(np.int64),
            context_lens=context_lens,
            num_decodes=num_decodes,
            uniform_decode=uniform_decode,
        )
        ids_T = gather_step_inputs(self.ops, self.rows, step, self.block_size, inputs.block_tables_SB)[0]
        self.attention.plan(inputs)
        return self.model.forward(ids_T, step.positions_T, self.attention)

    def _logits(self, hidden_TD: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        """Logits after these tokens of the step (int64)."""
        return self.rank_group.parallel.all_gather(self.model.compute_logits(hidden_TD[to_device(places, self.device)]))

    def _replay(self, capture: Capture, step: StepBuffer, batch: Batch, rows: np.ndarray) -> PendingStep:
        """As one graph, which draws for all rows as if they wanted no more than a plain draw."""
        assert self.graphs is not None
        on_host_S, done = self.graphs.replay(capture)
        count = len(rows)
        if self.sampler.plain[rows].all():
            return PendingStep(on_host_S[:count], batch.samples, [], done, self.watched)
        logits_SV, tokens_S = self.rank_group.parallel.all_gather(capture.logits_SV)[:count], capture.tokens_S[:count]
        again = self.sampler.beyond_plain(rows, step.arrays.context_lens_S[:count]) & batch.samples
        everyone = self._drawing(step, batch, rows, np.arange(count))
        if again.all():
            tokens_S = self.sampler.draw(logits_SV, *everyone)
        elif again.any():
            chosen = np.flatnonzero(again)
            place = to_device(chosen, self.device)
            tokens_S[place] = self.sampler.draw(logits_SV[place], *self._drawing(step, batch, rows, chosen))
        self.rows.last_token_R[capture.buffer.tensors.targets_S[:count]] = tokens_S
        self.rank_group.parallel.broadcast(self.rows.last_token_R)
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
            first = max(start + 1, sequence.params.prompt_logprobs_start)
            end = min(start + count + 1, sequence.num_prompt_tokens)
            if first < end and sequence.needs_prompt_logits:
                wanted = num_candidates(sequence.params.prompt_logprobs, self.model.vocab_size)
                spans.append(Span(sequence, first, end - first, wanted))
        return spans

    def _prompt_logprobs(self, hidden_TD: torch.Tensor, spans: list[Span], scored_L: np.ndarray) -> TopLogprobs:
        token_ids = [i for s in spans for i in s.sequence.token_ids[s.position : s.position + s.num_tokens]]
        token_ids_L = to_device(np.array(token_ids, np.int64), self.device)
        return top_logprobs(spans, lambda part: self._logits(hidden_TD, scored_L[part]), token_ids_L)

    def _update_rows(self, batch: Batch) -> tuple[np.ndarray, bool, tuple[np.ndarray, np.ndarray]]:
        """Rows of the batch's sequences, int64 [S], brought up to date; whether any had none before; what changed.

        The changes are those of block tables and sampling parameters, as in `StepMessage`.
        """
        rows = np.empty(len(batch.sequences), np.int64)
        any_new = False
        for index, sequence in enumerate(batch.sequences):
            if sequence.slot < 0:
                self._assign_row(sequence)
                any_new = True
            rows[index] = sequence.slot
            self.tables.update(sequence.slot, sequence.block_table)
        params_2R = np.empty((2, 0), np.int64)
        if self.params_changed:
            params_2R = np.stack((self.sampler.temperature.astype(np.float64).view(np.int64), self.sampler.seed))
        self.params_changed = False
        changes = self.tables.take_changes(), params_2R
        if self.device.type == "cuda":  # on a CPU the rows are the host's own memory
            self._apply(*changes)
        return rows, any_new, changes

    def _apply(self, tables_2C: np.ndarray, params_2R: np.ndarray) -> None:
        """Bring the rows on the device up to date."""
        self.tables.apply(tables_2C)
        if params_2R.size:
            temperature_R, seed_R = params_2R
            self.rows.temperature_R.copy_(to_device(temperature_R.view(np.float64), self.device))
            self.rows.seed_R.copy_(to_device(seed_R, self.device))

    def _assign_row(self, sequence: Sequence) -> None:
        row = sequence.slot = self.free_rows.pop()
        self.sampler.assign(row, sequence)
        self.num_scored += sequence.params.prompt_logprobs is not None
        self.params_changed = True

    def _pending(self, tokens_S: torch.Tensor, samples: list[bool], logprobs: list[TopLogprobs]) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(tokens_S, samples, logprobs, None, None)
        on_host = _to_host(tokens_S), samples, [part.map(_to_host) for part in logprobs]
        done = torch.cuda.Event()
        done.record()
        return PendingStep(*on_host, done, self.watched)

    @property
    def watched(self) -> RankGroup | None:
        """As `PendingStep.rank_group`."""
        return self.rank_group if self.rank_group.parallel.size > 1 else None

    def close(self) -> None:
        """End the other ranks, if there are any. Nothing can be submitted then; may be called again."""
        if self.rank_group.parallel.size > 1:
            self.graphs = None  # NCCL doesn't let go of ranks that a graph refers to
            self.rank_group.close()


def _scored(spans: list[Span], batch: Batch, step: StepBuffer) -> np.ndarray:
    """Tokens of the step that come before those of the spans: their logits are wanted. int64 [L]"""
    if not spans:
        return np.empty(0, np.int64)
    shifts = step.arrays.query_start_S1[:-1].astype(np.int64) - batch.starts  # from position to place in the step
    shift = dict(zip(batch.sequences, shifts.tolist(), strict=False))
    return np.concatenate([shift[s.sequence] + np.arange(s.position, s.position + s.num_tokens) - 1 for s in spans])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there once the current stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
