"""Steps as CUDA graphs: from the rows' last tokens to their next ones in one launch.

A captured step reads and writes fixed addresses: the step's arrays come through pinned memory, the rest lies on the
device by slot. The sampler leaves each row's token where the next step's input is read, so the host need not know the
tokens to submit the next step. There are graphs for some numbers of decoding sequences, and for some numbers of tokens
in steps with prefill chunks; a step takes the smallest that it fits into, and pads.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelArch
from nanoflow.core.data.batch import AttentionInput
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.execution.pinned_io import PinnedIO
from nanoflow.core.execution.step_buffer import StepBuffer, StepInput
from nanoflow.core.ops import Ops

MOST_TOKENS = 8192  # beyond, the device needs longer than the host does to launch a step's kernels


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture decode steps for: fine where a padded row costs most, up to `max_num_seqs`."""
    sizes = [1, 2, 4, 8, *range(16, 129, 16), *range(160, 257, 32), *range(320, 1025, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_sizes(max_num_batched_tokens: int) -> list[int]:
    """Token counts to capture steps with prefill for, each a third or a half more than the one before from 64 on."""
    most = min(max_num_batched_tokens, MOST_TOKENS)
    sizes = [16, 32, *(size for power in range(6, 13) for size in (2**power, 2**power * 3 // 2))]
    return [size for size in sizes if size < most] + [most]


def most_seqs(num_tokens: int, max_num_seqs: int) -> int:
    """Sequences in a captured step of so many tokens, one for padding included."""
    return min(num_tokens, max_num_seqs) + 1


def num_rows(decodes: list[int], tokens: list[int], max_num_seqs: int) -> int:
    """Rows of logits that the graphs for these sizes hold together."""
    return sum(decodes) + sum(most_seqs(size, max_num_seqs) for size in tokens)


@dataclass(frozen=True, slots=True)
class SlotState:
    """What is kept on the device for R rows, the last of which is for padding.

    Attributes:
        block_tables_RB: int32.
        last_token_R: int64; what each row sampled last; a step writes it.
        temperature_R: float32; 0 is greedy.
        seed_R: int64; any 64 bits.
    """

    block_tables_RB: torch.Tensor
    last_token_R: torch.Tensor
    temperature_R: torch.Tensor
    seed_R: torch.Tensor


@dataclass(slots=True)
class Capture:
    """One captured step and its fixed tensors.

    Attributes:
        graph: what is replayed.
        buffer: the step's arrays, on the device.
        inputs: what the attention backend planned with; the graph writes to its block tables.
        logits_SV: for rows that need more than a plain draw; with several ranks, this one's part of the vocabulary.
        tokens_S: int64; the plain draw, also written to `SlotState.last_token_R`.
    """

    graph: torch.cuda.CUDAGraph
    buffer: StepBuffer
    inputs: AttentionInput
    logits_SV: torch.Tensor
    tokens_S: torch.Tensor


class CudaGraphs:
    """Captures steps when it is made, and replays them.

    Args:
        model, attention: as in `ModelRunner`; the backend is `capturable`, and its cache has one block more than the
            block manager hands out, the last, where padding goes.
        rows: the state that steps read and write.
        parallel: this rank among those that share the model.
        ops: to compute with.
        block_size: P.
        decodes: batch sizes to capture decode steps for, rising.
        tokens: token counts to capture all other steps for, rising; none for a backend that isn't `capturable_chunks`.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, rows: SlotState, parallel: ParallelContext, *,
        ops: Ops, block_size: int, decodes: list[int], tokens: list[int],
    ) -> None:  # fmt: skip
        self.model = model
        self.ops = ops
        self.attention = attention
        self.rows = rows
        self.parallel = parallel
        self.block_size = block_size
        self.max_num_seqs = len(rows.last_token_R) - 1
        self.decodes = decodes
        self.tokens = tokens
        self.pinned_io = self._pinned_io()
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one for all captures, since memory is kept by stream
        # The largest first: the others fit into its memory.
        self.of_tokens = {
            size: self._capture(size, most_seqs(size, self.max_num_seqs), uniform_decode=False)
            for size in reversed(tokens)
        }
        self.of_decodes = {size: self._capture(size, size, uniform_decode=True) for size in reversed(decodes)}
        torch.cuda.empty_cache()

    def find(self, num_tokens: int, num_seqs: int, *, uniform_decode: bool) -> Capture | None:
        """The graph for such a step, if there is one; `uniform_decode` as in `AttentionInput`."""
        if uniform_decode:
            return self.of_decodes[self.decodes[bisect_left(self.decodes, num_seqs)]]
        index = bisect_left(self.tokens, num_tokens)
        if index == len(self.tokens):
            return None
        size = self.tokens[index]
        padding = size - num_tokens
        if padding > self.rows.block_tables_RB.shape[1] * self.block_size:
            return None  # more than a sequence may have
        return self.of_tokens[size] if num_seqs + (padding > 0) <= most_seqs(size, self.max_num_seqs) else None

    def open(self, capture: Capture) -> StepBuffer:
        """Where to write the arrays of the step to be replayed, on the host."""
        return self.pinned_io.open(capture.buffer.num_tokens, capture.buffer.num_seqs)

    def replay(self, capture: Capture) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Run the step whose arrays were written last; returns what `PinnedIO.send` does.

        What it leaves on the device is valid until the next replay of any graph.
        """
        capture.graph.replay()
        return self.pinned_io.send()

    def _pinned_io(self) -> PinnedIO:
        num_tokens = max(self.decodes + self.tokens)
        return PinnedIO(num_tokens, most_seqs(num_tokens, self.max_num_seqs), self.rows.last_token_R.device, self.ops)

    def _capture(self, num_tokens: int, num_seqs: int, *, uniform_decode: bool) -> Capture:
        device, width = self.rows.last_token_R.device, self.rows.block_tables_RB.shape[1]
        buffer = StepBuffer(num_tokens, num_seqs, device)
        step = buffer.tensors
        padding = self.pinned_io.open(num_tokens, num_seqs)
        self._pad(padding.arrays, uniform_decode=uniform_decode)
        buffer.memory.copy_(padding.memory)
        inputs = AttentionInput(
            slot_mapping_T=step.slots_T,
            query_start_S1=step.query_start_S1,
            context_lens_S=step.context_lens_S,
            block_tables_SB=self.rows.block_tables_RB[step.rows_S],
            query_lens=np.full(num_seqs, 1 if uniform_decode else num_tokens),
            context_lens=np.full(num_seqs, width * self.block_size),
            num_decodes=num_seqs if uniform_decode else 0,
            uniform_decode=uniform_decode,
        )
        # Not `torch.cuda.graph`, which gives all unused memory back before each capture: with many that takes seconds.
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(buffer, inputs)  # compiles kernels and sizes workspaces, which a capture can't
            self.pinned_io.send()
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # NCCL has a thread that looks on
            logits_SV, tokens_S = self._step(buffer, inputs)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return Capture(graph, buffer, inputs, logits_SV, tokens_S)

    def _pad(self, step: StepInput, *, uniform_decode: bool) -> None:
        """Make it a step of nothing but padding, to capture with."""
        step.token_ids_T[:] = step.positions_T[:] = step.query_start_S1[:] = 0
        step.slots_T[:] = int(self.rows.block_tables_RB[-1, 0]) * self.block_size
        step.rows_S[:] = step.targets_S[:] = self.max_num_seqs
        step.query_start_S1[1:] = np.arange(1, len(step.rows_S) + 1) if uniform_decode else 1
        step.context_lens_S[:] = 1

    def _step(self, buffer: StepBuffer, inputs: AttentionInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, as `Capture` has them, and tokens [S] of one step."""
        rows, step = self.rows, buffer.tensors
        self.pinned_io.receive(buffer)
        ids_T, temperature_S, seed_S = gather_step_inputs(
            self.ops, rows, step, self.block_size, inputs.block_tables_SB, self.pinned_io
        )
        self.attention.plan(inputs)
        hidden = self.model.forward(ids_T, step.positions_T, self.attention)
        if not inputs.uniform_decode:
            hidden = hidden[step.query_start_S1[1:] - 1]
        logits_SV = self.model.compute_logits(hidden)
        tokens_S = self.ops.sample(
            logits_SV, temperature_S, seed_S, step.context_lens_S, None, rows.last_token_R, step.targets_S,
            self.pinned_io.outbox, self.pinned_io.turn_1, self.parallel,
        )  # fmt: skip
        return logits_SV, tokens_S


def gather_step_inputs(
    ops: Ops, rows: SlotState, step: StepInput, block_size: int, block_tables_SB: torch.Tensor,
    pinned_io: PinnedIO | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the rows of a step hold: its token ids [T], temperatures [S] and seeds [S]; fills its block tables.

    Counts the step in pinned I/O, if it came through one.
    """
    return ops.gather_step_inputs(
        step.token_ids_T, rows.last_token_R, step.rows_S, step.context_lens_S, rows.block_tables_RB,
        rows.temperature_R, rows.seed_R, block_size, block_tables_SB, None if pinned_io is None else pinned_io.turn_1,
    )  # fmt: skip
