"""The executor in this process: from a batch to a step, its execution, and what is sampled beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch

from nanoflow.core.config.errors import NanoflowError, one_line
from nanoflow.core.contracts.executor import Capabilities, Executor, PendingStep
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.outputs import Logprob
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution.input_batch import InputBatch, fill
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.plan import device_name
from nanoflow.core.execution.prompt_logprobs import prompt_spans, prompt_tokens, scored_tokens
from nanoflow.core.execution.step_message import StepMessage
from nanoflow.core.execution.step_output import StepOutput
from nanoflow.core.execution.uncaptured_steps import UncapturedSteps
from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.sampling.logprobs import Span, TopLogprobs, top_logprobs
from nanoflow.core.sampling.sampling_input import SamplingInput

POLL_SECONDS = 5e-5  # between looks at the device and at the other ranks


@dataclass(slots=True)
class DeviceStep(PendingStep):
    """A step on a device.

    Attributes:
        tokens_S: int64; on the host once `done`.
        samples: which of them count.
        parts: log-probabilities, on the host as well.
        done: None if it is done already.
        rank_group: whose loss would make the step last for ever; None for a rank that is alone.
        failed: as `failures` gives it.
    """

    tokens_S: torch.Tensor
    samples: list[bool]
    parts: list[TopLogprobs]
    done: torch.cuda.Event | None
    rank_group: RankGroup | None
    failed: list[tuple[Sequence, str]] = field(default_factory=list)

    def result(self) -> list[int]:
        if self.done is not None:
            while self.rank_group is not None and not self.done.query():
                self.rank_group.check()
                time.sleep(POLL_SECONDS)
            self.done.synchronize()
        return list(compress(self.tokens_S.tolist(), self.samples))

    def logprobs(self, decode: Callable[[int], str | None]) -> Iterator[tuple[Sequence, int, list[dict[int, Logprob]]]]:
        for part in self.parts:
            yield from part.read(decode)

    def failures(self) -> list[tuple[Sequence, str]]:
        return self.failed


class LocalExecutor(Executor):
    """Runs batches with this process's model runner.

    Where ranks share the model, each of them may have one, and submit the same batches.

    Args:
        runner: executes steps.
        processors: logits processors, for as many slots as the runner has sequences.
    """

    def __init__(self, runner: ModelRunner, processors: LogitsProcessors) -> None:
        self.runner = runner
        group, vocab_size = runner.rank_group, runner.model.vocab_size
        self.watched = group if group.parallel.size > 1 else None  # as `DeviceStep.rank_group`
        self.sampler = BatchSampler(runner.max_num_seqs, vocab_size, runner.device, runner.ops, processors)
        width = runner.slots.block_tables_RB.shape[1]
        self.uncaptured = UncapturedSteps()
        self.inputs = InputBatch(runner.max_num_seqs, width, runner.num_kv_blocks, self.sampler)
        self.capabilities = Capabilities(
            device=device_name(runner.device, group.parallel.size, runner.threads.number),
            device_type=runner.device.type,
            vocab_size=vocab_size,
            block_size=runner.block_size,
            num_kv_blocks=runner.num_kv_blocks,
            max_num_seqs=runner.max_num_seqs,
            max_model_len=runner.max_model_len,
        )

    def release(self, sequence: Sequence) -> None:
        self.inputs.release(sequence)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingStep:
        with self.runner.threads:
            return self._submit(batch)

    def _submit(self, batch: Batch) -> PendingStep:
        try:
            slots, any_new = self.inputs.update(batch)
            spans = prompt_spans(batch, self.capabilities.vocab_size) if self.inputs.num_scored else []
            step = self.make_step(batch, slots, spans, any_new=any_new)
            return self._finish(batch, slots, spans, step, self._execute(step))
        except RuntimeError:  # such as of a sum that a rank was missing for
            self.runner.rank_group.raise_if_rank_lost()
            raise

    def call(self, method: str, *args: Any) -> list[Any]:
        try:
            return [getattr(self.runner, method)(*args)]
        except Exception as error:
            raise NanoflowError(f"{method} failed on rank 0: {one_line(error)}.") from error

    def close(self) -> None:
        self.runner.close()

    def make_step(self, batch: Batch, slots: np.ndarray, spans: list[Span], *, any_new: bool) -> StepMessage:
        """The step that computes a batch, as every rank executes it.

        Args:
            batch: with slots for its sequences.
            slots: int64 [S]; these.
            spans: prompt tokens that it scores.
            any_new: whether any of them had none before.
        """
        runner, tables_RB = self.runner, self.inputs.tables.blocks_RB
        num_tokens, num_seqs = batch.total_tokens, len(slots)
        uniform_decode = num_tokens == num_seqs and not any_new
        capture = None
        if runner.graphs is not None and not spans:  # captured steps keep the logits of last tokens only
            capture = runner.graphs.find(num_tokens, num_seqs, uniform_decode=uniform_decode)
            if capture is None:
                self.uncaptured.note(num_tokens, num_seqs)
        if capture is not None:
            num_tokens, num_seqs = capture.buffer.num_tokens, capture.buffer.num_seqs
        buffer = runner.open_buffer(num_tokens, num_seqs, capture is not None)
        arrays = buffer.arrays
        fill(arrays, batch, slots, tables_RB, runner.block_size, uniform_decode=uniform_decode)
        temperature_only = bool(self.sampler.temperature_only[slots].all())
        scored_L = scored_tokens(spans, batch, arrays.query_start_S1)
        return StepMessage(
            buffer, uniform_decode, capture is not None, temperature_only, batch.num_decodes, scored_L,
            *self.inputs.take_changes(),
        )  # fmt: skip

    def _execute(self, step: StepMessage) -> StepOutput:
        return self.runner.execute(step)

    def _finish(
        self, batch: Batch, slots: np.ndarray, spans: list[Span], step: StepMessage, output: StepOutput
    ) -> DeviceStep:
        """Take what the step brings, and sample what wants more than temperature sampling."""
        parts = [self._prompt_logprobs(spans, output)] if spans else []
        if step.temperature_only:
            if output.on_host is not None:
                tokens_S, done = output.on_host
                return DeviceStep(tokens_S[: len(slots)], batch.samples, parts, done, self.watched)
            return self._pending(output.tokens_S, [True] * len(output.tokens_S), parts)
        # A captured step has logits of all sequences, any other of those that sample.
        chosen = np.arange(len(slots)) if step.captured else np.flatnonzero(batch.samples)
        logits_SV, count = output.logits_SV[: len(chosen)], len(chosen)
        rows = SamplingInput(
            batch.sequences if step.captured else [batch.sequences[index] for index in chosen.tolist()],
            slots[chosen], step.buffer.arrays.context_lens_S[chosen].astype(np.int64), output.params.take(slice(count)),
        )  # fmt: skip
        samples = np.array(batch.samples)[chosen]
        tokens_S = self._sample(logits_SV, rows, samples, None if output.tokens_S is None else output.tokens_S[:count])
        self.runner.set_tokens(tokens_S, rows.params.targets_S)
        parts += self.sampler.logprobs(logits_SV, tokens_S, rows, samples)
        return self._pending(tokens_S, samples.tolist(), parts)

    def _sample(
        self, logits_SV: torch.Tensor, rows: SamplingInput, samples: np.ndarray, tokens_S: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens of all rows; `tokens_S`, if there are any, hold for those that want no more than temperature."""
        if tokens_S is None:
            return self.sampler.sample(logits_SV, rows)
        resampled = self.sampler.needs_resampling(rows.slots, rows.positions) & samples
        if resampled.all():
            return self.sampler.sample(logits_SV, rows)
        others, chosen = np.flatnonzero(samples & ~resampled), np.flatnonzero(resampled)
        self.sampler.observe(rows.slots[others], tokens_S[to_device(others, self.runner.device)])
        if len(chosen):
            place = to_device(chosen, self.runner.device)
            tokens_S[place] = self.sampler.sample(logits_SV[place], rows.take(chosen))
        return tokens_S

    def _prompt_logprobs(self, spans: list[Span], output: StepOutput) -> TopLogprobs:
        token_ids_L = to_device(prompt_tokens(spans), self.runner.device)
        return top_logprobs(spans, lambda part: next(output.scored), token_ids_L)

    def _pending(self, tokens_S: torch.Tensor, samples: list[bool], parts: list[TopLogprobs]) -> DeviceStep:
        failed = self.sampler.processors.take_failures()
        if self.runner.device.type == "cpu":
            return DeviceStep(tokens_S, samples, parts, None, None, failed)
        on_host = _to_host(tokens_S), samples, [part.map(_to_host) for part in parts]
        done = torch.cuda.Event()
        done.record()
        return DeviceStep(*on_host, done, self.watched, failed)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, there once the current stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
