"""The model runner: one rank's model, KV cache and slot state, and the one way in which it executes steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.model import ModelArch
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.data.transfer import to_device
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution.cuda_graphs import Capture, CudaGraphs
from nanoflow.core.execution.pinned_io import PinnedIO
from nanoflow.core.execution.plan import device_name
from nanoflow.core.execution.slot_state import SlotState
from nanoflow.core.execution.step_buffer import StepBuffer, StepInput
from nanoflow.core.execution.step_message import StepMessage
from nanoflow.core.execution.step_output import StepOutput
from nanoflow.core.execution.threads import Threads
from nanoflow.core.ops import Ops
from nanoflow.core.sampling import logprobs
from nanoflow.core.sampling.sampling_input import RowParams


class ModelRunner:
    """Executes steps on one device, in the order in which they come. All ranks do it, with the same steps.

    Args:
        model: weights loaded.
        attention: its cache allocated.
        device: where they are.
        block_size: P.
        max_num_seqs: most sequences in a step, and most that hold blocks.
        max_model_len: most tokens in a sequence.
        num_kv_blocks: blocks for sequences. The cache has one more, the last, where captured steps put padding.
        rank_group: the ranks that share the model. All of them capture and execute in the same order.
        ops: to compute with.
        num_threads: that steps take on a CPU; None for PyTorch's own number.

    Attributes:
        threads: to execute steps within.
        slots: the state that steps read and write.
        graphs: replays steps that it has a graph for; None runs all of them kernel by kernel.
    """

    def __init__(
        self, model: ModelArch, attention: AttentionBackend, *, device: torch.device, block_size: int,
        max_num_seqs: int, max_model_len: int, num_kv_blocks: int, rank_group: RankGroup, ops: Ops,
        num_threads: int | None = None,
    ) -> None:  # fmt: skip
        self.ops = ops
        self.threads = Threads(num_threads if device.type == "cpu" else None)
        self.rank_group = rank_group
        self.model = model
        self.attention = attention
        self.device = device
        self.block_size = block_size
        self.max_num_seqs = self.padding_slot = max_num_seqs
        self.max_model_len = max_model_len
        self.num_kv_blocks = num_kv_blocks
        self.slots = SlotState.empty(max_num_seqs, -(-max_model_len // block_size), num_kv_blocks, device)
        self.graphs: CudaGraphs | None = None

    @torch.inference_mode()
    def capture(self, decodes: list[int], tokens: list[int]) -> None:
        """Capture decode steps of these batch sizes, and other steps of these numbers of tokens."""
        self.graphs = CudaGraphs(
            self._compute, self.slots, self.ops, block_size=self.block_size, decodes=decodes, tokens=tokens
        )

    def open_buffer(self, num_tokens: int, num_seqs: int, captured: bool) -> StepBuffer:
        """Where to write the arrays of the step to be executed next, on the host."""
        if captured:
            assert self.graphs is not None
            return self.graphs.pinned_io.open(num_tokens, num_seqs)
        return StepBuffer(num_tokens, num_seqs, torch.device("cpu"), pinned=self.device.type == "cuda")

    @torch.inference_mode()
    def execute(self, step: StepMessage) -> StepOutput:
        """Logits and tokens of a step, whose arrays are in the memory of `open_buffer`.

        Returns at once on a GPU; on a CPU when it is done.
        """
        self.slots.apply(step.tables_2C, step.params_3C)
        output = self._replay(step) if step.captured else self._run(step)
        if not step.temperature_only:
            output.logits_SV = self.rank_group.parallel.all_gather(output.logits_SV)
        return output

    def _replay(self, step: StepMessage) -> StepOutput:
        """As one graph, which samples all rows by temperature alone."""
        assert self.graphs is not None
        capture: Capture = self.graphs.of_size(step.buffer.num_tokens, uniform_decode=step.uniform_decode)
        on_host = self.graphs.replay(capture)
        output = capture.output
        return StepOutput(output.logits_SV, output.params, output.tokens_S, on_host=on_host)

    def _run(self, step: StepMessage) -> StepOutput:
        """Kernel by kernel. The step has no padding."""
        host = buffer = step.buffer
        if self.device.type == "cuda":
            buffer = StepBuffer(host.num_tokens, host.num_seqs, self.device)
            buffer.memory.copy_(host.memory, non_blocking=True)
        arrays, tensors = host.arrays, buffer.tensors
        context_lens = arrays.context_lens_S.astype(np.int64)
        width = -(-int(context_lens.max()) // self.block_size)
        inputs = AttentionInput(
            slot_mapping_T=tensors.slot_mapping_T,
            query_start_S1=tensors.query_start_S1,
            context_lens_S=tensors.context_lens_S,
            block_tables_SB=self.slots.block_tables_RB.new_zeros(host.num_seqs, width),
            query_lens=np.diff(arrays.query_start_S1).astype(np.int64),
            context_lens=context_lens,
            num_decodes=step.num_decodes,
            uniform_decode=step.uniform_decode,
        )
        sampling = np.flatnonzero(arrays.targets_S != self.padding_slot)
        return self._compute(
            tensors, inputs, sampling=None if len(sampling) == host.num_seqs else sampling, scored_L=step.scored_L,
            samples=step.temperature_only,
        )  # fmt: skip

    def _compute(
        self, step: StepInput, inputs: AttentionInput, pinned_io: PinnedIO | None = None, *,
        sampling: np.ndarray | None = None, scored_L: np.ndarray | None = None, samples: bool = True,
    ) -> StepOutput:  # fmt: skip
        """The kernels of a step, captured or not.

        Args:
            step: its arrays on the device.
            inputs: what attention plans with; its block tables are filled here.
            pinned_io: where a captured step comes from, and where its tokens go; None for others.
            sampling: indices of the sequences that sample; None for all.
            scored_L: tokens of the step whose logits are wanted, beside those of last tokens.
            samples: whether to sample, by temperature alone. All ranks do it, each from its part of the vocabulary.
        """
        slots, ops = self.slots, self.ops
        outbox, turn_1 = (pinned_io.outbox, pinned_io.turn_1) if pinned_io is not None else (None, None)
        ids_T, temperature_S, seed_S = ops.gather_step_inputs(
            step.token_ids_T, slots.last_token_R, step.slots_S, step.context_lens_S, slots.block_tables_RB,
            slots.temperature_R, slots.seed_R, self.block_size, inputs.block_tables_SB, turn_1,
        )  # fmt: skip
        self.attention.plan(inputs)
        hidden_TD = self.model.forward(ids_T, step.positions_T, self.attention)
        params = RowParams(temperature_S, seed_S, step.context_lens_S, step.targets_S)
        hidden_SD = hidden_TD if inputs.uniform_decode else hidden_TD[step.query_start_S1[1:] - 1]
        if sampling is not None:
            place = to_device(sampling, self.device)
            hidden_SD, params = hidden_SD[place], params.take(place)
        logits_SV, tokens_S = self.model.compute_logits(hidden_SD), None
        if samples:
            tokens_S = ops.sample(
                logits_SV, params.temperature_S, params.seed_S, params.position_S, None, slots.last_token_R,
                params.targets_S, outbox, turn_1, self.rank_group.parallel,
            )  # fmt: skip
        output = StepOutput(logits_SV, params, tokens_S)
        if scored_L is not None and len(scored_L):
            output.scored = self._scored(hidden_TD, scored_L)
        return output

    def _scored(self, hidden_TD: torch.Tensor, scored_L: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(scored_L), logprobs.ROWS):
            place = to_device(scored_L[start : start + logprobs.ROWS], self.device)
            yield self.rank_group.parallel.all_gather(self.model.compute_logits(hidden_TD[place]))

    def set_tokens(self, tokens_S: torch.Tensor | None, targets_S: torch.Tensor | None) -> None:
        """Write what rank 0 sampled, None on other ranks, to the slots of all ranks."""
        if tokens_S is not None:
            self.slots.last_token_R[targets_S] = tokens_S
        self.rank_group.parallel.broadcast(self.slots.last_token_R)

    def device_name(self) -> str:
        """What the device is called."""
        return device_name(self.device, num_threads=self.threads.number)

    def close(self) -> None:
        """End the other ranks, if there are any. Nothing can be executed then; may be called again."""
        if self.rank_group.parallel.size > 1:
            self.graphs = None  # NCCL doesn't let go of ranks that a graph refers to
            self.rank_group.close()
