"""Running an engine in a test, and watching what it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nanoflow import LLM, SamplingParams
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.engine.engine import Engine
from nanoflow.testing.checkpoints import NUM_OUTPUT_TOKENS, Reference


def greedy(max_tokens: int = NUM_OUTPUT_TOKENS, **options: Any) -> SamplingParams:
    """Greedy, and blind to end-of-sequence unless told otherwise."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | options)


def engine_of(llm: LLM) -> Engine:
    """The engine below the offline API."""
    return llm._engine


@contextmanager
def recorded(llm: LLM) -> Iterator[list[Batch]]:
    """The batches that run meanwhile."""
    batches: list[Batch] = []
    executor = engine_of(llm).executor
    submit = executor.submit

    def submit_and_record(batch: Batch) -> Any:
        batches.append(batch)
        return submit(batch)

    executor.submit = submit_and_record  # type: ignore[method-assign]
    try:
        yield batches
    finally:
        del executor.submit


def is_mixed(batch: Batch) -> bool:
    """Whether a batch decodes some sequences while it prefills others."""
    return 0 < batch.num_decodes < len(batch.sequences)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The generated ids of each request."""
    return [output.outputs[0].token_ids for output in outputs]


def check(
    llm: LLM, reference: Reference, order: Sequence[int] | None = None, max_tokens: Sequence[int] | None = None
) -> list[RequestOutput]:
    """Generate from the reference's prompts, in one call, and compare.

    Args:
        llm: of the reference's checkpoint.
        reference: prompts and right answers.
        order: which prompts, in what order, possibly repeated; all of them by default.
        max_tokens: how many tokens for each; as many as the reference has by default.
    """
    order = range(len(reference.prompts)) if order is None else order
    lengths = [NUM_OUTPUT_TOKENS] * len(order) if max_tokens is None else max_tokens
    outputs = llm.generate(
        [reference.prompts[i] for i in order], [greedy(length) for length in lengths], use_tqdm=False
    )
    expected = [reference.outputs[i][:length] for i, length in zip(order, lengths, strict=True)]
    assert tokens(outputs) == expected
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    return outputs
