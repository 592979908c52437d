"""The reference executor: from a batch to its tokens, eager, in plain PyTorch, with nothing kept between steps.

It is what `engine.accelerate=false` runs, and says what every other executor computes. Slots, pinned buffers, graphs
and steps in flight, which those have, only save time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nanoflow.core.contracts.executor import PendingStep
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.execution.local_executor import LocalExecutor


@dataclass(slots=True)
class FinishedStep(PendingStep):
    """A step that was done when it was submitted, and brought tokens alone."""

    token_ids: list[int]

    def result(self) -> list[int]:
        return self.token_ids

    def logprobs(self, decode: object) -> tuple[()]:
        return ()

    def failures(self) -> list[tuple[Sequence, str]]:
        return []


class ReferenceExecutor(LocalExecutor):
    """Runs batches on one rank, all of whose tokens are known: no step is in flight when the next is scheduled.

    Steps in which a sequence asks for more than temperature sampling (filters, log-probabilities, logits processors)
    are `LocalExecutor`'s, which keeps by slot what such sequences ask for.
    """

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingStep:
        with self.runner.threads:
            return self._submit(batch)

    def _submit(self, batch: Batch) -> PendingStep:
        if not all(map(self._is_plain, batch.sequences)):
            return super()._submit(batch)
        for sequence in batch.preempted:
            self.release(sequence)
        runner, device = self.runner, self.runner.device
        token_ids_T, positions_T = tokens_of(batch)
        inputs = attention_input(batch, positions_T, runner.block_size, device)
        runner.attention.plan(inputs)
        hidden_TD = runner.model.forward(
            torch.from_numpy(token_ids_T).to(device), torch.from_numpy(positions_T).to(device), runner.attention
        )
        sampling = torch.tensor(batch.samples).nonzero().squeeze(-1).to(device)
        last_S = inputs.query_start_S1[1:][sampling] - 1  # of each sequence that samples, its last token in the step
        logits_SV = runner.model.compute_logits(hidden_TD[last_S])
        sequences = [batch.sequences[index] for index in sampling.tolist()]
        temperature_S = torch.tensor([temperature(s) for s in sequences], dtype=torch.float32, device=device)
        seed_S = torch.tensor([s.seed for s in sequences], dtype=torch.int64, device=device)
        return FinishedStep(
            runner.ops.sample(logits_SV, temperature_S, seed_S, inputs.context_lens_S[sampling]).tolist()
        )

    def release(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            super().release(sequence)

    def _is_plain(self, sequence: Sequence) -> bool:
        """Whether it asks for no more than temperature sampling."""
        params = sequence.params
        filtered = 0 < params.top_k < self.runner.model.vocab_size or params.top_p < 1 or params.min_p > 0
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        return not filtered and not scored and not self.sampler.processors.may_use(params)


def tokens_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [T] of the batch, one sequence after the other, and their positions [T]; both int64."""
    spans = [(start, start + count) for start, count in zip(batch.starts, batch.num_tokens, strict=True)]
    token_ids = [s.token_ids[start:end] for s, (start, end) in zip(batch.sequences, spans, strict=True)]
    return np.concatenate(token_ids), np.concatenate([np.arange(start, end) for start, end in spans])


def attention_input(
    batch: Batch, positions_T: np.ndarray, block_size: int, device: torch.device
) -> AttentionInput:  # fmt: skip
    """Where the batch's tokens lie in the cache: token at position p of a sequence in its block p // P, place p % P."""
    query_lens, context_lens = np.array(batch.num_tokens), np.array(batch.starts) + batch.num_tokens
    tables_SB = np.zeros((len(query_lens), max(len(s.block_table) for s in batch.sequences)), np.int64)
    for row, sequence in zip(tables_SB, batch.sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    blocks_T = tables_SB[np.repeat(np.arange(len(query_lens)), query_lens), positions_T // block_size]
    return AttentionInput(
        slot_mapping_T=torch.from_numpy(blocks_T * block_size + positions_T % block_size).to(device),
        query_start_S1=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables_SB=torch.tensor(tables_SB, dtype=torch.int32, device=device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=batch.num_decodes,
    )


def temperature(sequence: Sequence) -> float:
    """The one to sample with; values that float32 would round to 0 or infinity are kept short of it."""
    wanted = sequence.params.temperature
    return min(max(wanted, 1e-6), 1e6) if wanted > 0 else 0.0
