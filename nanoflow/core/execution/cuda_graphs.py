"""Steps as CUDA graphs: from the slots' last tokens to their next ones in one launch.

A captured step reads and writes fixed addresses: the step's arrays come through pinned memory, the rest lies on the
device by slot. The sampler leaves each slot's token where the next step's input is read, so the host need not know the
tokens to submit the next step. There are graphs for some numbers of decoding sequences, and for some numbers of tokens
in steps with prefill chunks; a step takes the smallest that it fits into, and pads.

Steps run one after the other, so all graphs share their memory: one step buffer, one copy of block tables, of which
each has a slice, and one memory pool, in which their activations and logits lie over each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.execution.pinned_io import PinnedIO
from nanoflow.core.execution.slot_state import SlotState
from nanoflow.core.execution.step_buffer import StepBuffer, StepInput
from nanoflow.core.execution.step_output import StepOutput
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


def buffer_bytes(decodes: list[int], tokens: list[int], max_num_seqs: int, width: int) -> int:
    """Bytes of the step buffer and the block tables that graphs of these sizes share, of `width` blocks each."""
    if not decodes and not tokens:
        return 0
    num_tokens = max(decodes + tokens)
    num_seqs = most_seqs(num_tokens, max_num_seqs)
    return StepBuffer.num_bytes(num_tokens, num_seqs) + 4 * num_seqs * width


# Computes a step; in a captured one its tokens go to pinned I/O, too.
Compute = Callable[[StepInput, AttentionInput, PinnedIO], StepOutput]


@dataclass(slots=True)
class Capture:
    """One captured step and its fixed tensors, which are parts of what all graphs share.

    Attributes:
        graph: what is replayed.
        buffer: the step's arrays, on the device.
        inputs: what the attention backend planned with; the graph writes to its block tables.
        output: valid until any other graph is replayed.
    """

    graph: torch.cuda.CUDAGraph
    buffer: StepBuffer
    inputs: AttentionInput
    output: StepOutput


class CudaGraphs:
    """Captures steps when it is made, and replays them.

    Args:
        compute: computes a step, with an attention backend that is `capturable`, and whose cache has one block more
            than the block manager hands out, the last, where padding goes. It is not kept: its owner keeps the graphs.
        slots: the state that steps read and write.
        ops: to fetch steps with.
        block_size: P.
        decodes: batch sizes to capture decode steps for, rising.
        tokens: token counts to capture all other steps for, rising; none for a backend that isn't `capturable_chunks`.
    """

    def __init__(
        self, compute: Compute, slots: SlotState, ops: Ops, *, block_size: int, decodes: list[int], tokens: list[int]
    ) -> None:
        self.slots = slots
        self.block_size = block_size
        self.max_num_seqs = len(slots.last_token_R) - 1
        self.decodes = decodes
        self.tokens = tokens
        device, num_tokens = slots.last_token_R.device, max(decodes + tokens)
        num_seqs = most_seqs(num_tokens, self.max_num_seqs)
        self.pinned_io = PinnedIO(num_tokens, num_seqs, device, ops)
        self.memory = torch.empty(StepBuffer.num_bytes(num_tokens, num_seqs), dtype=torch.uint8, device=device)
        self.block_tables_SB = slots.block_tables_RB[-1:].repeat(num_seqs, 1)  # valid ids, also past the contexts
        self._capture_all(compute)

    def _capture_all(self, compute: Compute) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one for all captures, since memory is kept by stream
        # The largest first: the others fit into its memory.
        self.of_tokens = {size: self._capture(compute, size, uniform_decode=False) for size in reversed(self.tokens)}
        self.of_decodes = {size: self._capture(compute, size, uniform_decode=True) for size in reversed(self.decodes)}
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
        if padding > self.slots.block_tables_RB.shape[1] * self.block_size:
            return None  # more than a sequence may have
        return self.of_tokens[size] if num_seqs + (padding > 0) <= most_seqs(size, self.max_num_seqs) else None

    def of_size(self, num_tokens: int, *, uniform_decode: bool) -> Capture:
        """The graph for a step that has been padded to its size."""
        return (self.of_decodes if uniform_decode else self.of_tokens)[num_tokens]

    def replay(self, capture: Capture) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Run the step whose arrays were written to pinned I/O last; returns what `PinnedIO.send` does.

        What it leaves on the device is valid until the next replay of any graph.
        """
        capture.graph.replay()
        return self.pinned_io.send()

    def _capture(self, compute: Compute, num_tokens: int, *, uniform_decode: bool) -> Capture:
        buffer, inputs = self._fixed(num_tokens, uniform_decode=uniform_decode)
        padding = self.pinned_io.open(buffer.num_tokens, buffer.num_seqs)
        self._pad(padding.arrays, uniform_decode=uniform_decode)
        buffer.memory.copy_(padding.memory)
        # Not `torch.cuda.graph`, which gives all unused memory back before each capture: with many that takes seconds.
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(compute, buffer, inputs)  # compiles kernels and sizes workspaces, which a capture can't
            self.pinned_io.send()
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # NCCL has a thread that looks on
            output = self._step(compute, buffer, inputs)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        output.logits_SV = unowned(output.logits_SV)
        return Capture(graph, buffer, inputs, output)

    def _fixed(self, num_tokens: int, *, uniform_decode: bool) -> tuple[StepBuffer, AttentionInput]:
        """A graph's part of the shared step buffer and block tables, and what the backend plans with."""
        num_seqs = num_tokens if uniform_decode else most_seqs(num_tokens, self.max_num_seqs)
        memory = self.memory[: StepBuffer.num_bytes(num_tokens, num_seqs)]
        buffer = StepBuffer(num_tokens, num_seqs, self.memory.device, memory=memory)
        step = buffer.tensors
        return buffer, AttentionInput(
            slot_mapping_T=step.slot_mapping_T,
            query_start_S1=step.query_start_S1,
            context_lens_S=step.context_lens_S,
            block_tables_SB=self.block_tables_SB[:num_seqs],
            query_lens=np.full(num_seqs, 1 if uniform_decode else num_tokens),
            context_lens=np.full(num_seqs, self.block_tables_SB.shape[1] * self.block_size),
            num_decodes=num_seqs if uniform_decode else 0,
            uniform_decode=uniform_decode,
        )

    def _pad(self, step: StepInput, *, uniform_decode: bool) -> None:
        """Make it a step of nothing but padding, to capture with."""
        step.token_ids_T[:] = step.positions_T[:] = step.query_start_S1[:] = 0
        step.slot_mapping_T[:] = int(self.slots.block_tables_RB[-1, 0]) * self.block_size
        step.slots_S[:] = step.targets_S[:] = self.max_num_seqs
        step.query_start_S1[1:] = np.arange(1, len(step.slots_S) + 1) if uniform_decode else 1
        step.context_lens_S[:] = 1

    def _step(self, compute: Compute, buffer: StepBuffer, inputs: AttentionInput) -> StepOutput:
        self.pinned_io.receive(buffer)
        return compute(buffer.tensors, inputs, self.pinned_io)


class _Memory:
    """Bytes on a GPU that somebody else keeps."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3
        }  # fmt: skip


def unowned(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, without keeping its memory, which lies in the pool of a graph and is kept by that.

    So the graphs that are captured next put what they compute into the same memory.
    """
    storage = x.untyped_storage()
    memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=x.device)
    return memory.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
