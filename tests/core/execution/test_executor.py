"""What an executor must do, in this process and on ranks: batches made by hand, tokens as transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.contracts.executor import Executor, PendingStep
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.testing.checkpoints import Reference
from tests.core.checkpoints import VOCAB_SIZE, Oracle
from tests.core.running import engine_of, greedy
from tests.core.sentences import raises_sentence

BLOCKS = 24  # for each sequence


def start(reference: Reference, size: int) -> LLM:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4, "num_kv_blocks": 4 * BLOCKS}
    return LLM(str(reference.folder), tensor_parallel_size=size, max_num_seqs=4, **options)


@pytest.fixture(params=[1, 2], ids=["local", "ranks"], scope="module")
def executor(request: pytest.FixtureRequest, oracle: Oracle) -> Iterator[Executor]:
    with start(oracle("plain"), request.param) as llm:
        yield engine_of(llm).executor


def sequence_of(index: int, prompt: list[int], params: SamplingParams | None = None) -> Sequence:
    sequence = Sequence(str(index), prompt, params or greedy(), max_tokens=20, seed=index)
    sequence.block_table = list(range(index * BLOCKS, (index + 1) * BLOCKS))
    return sequence


def batch_of(sequences: list[Sequence], num_tokens: int | None = None, preempted: tuple[Sequence, ...] = ()) -> Batch:
    """At most so many tokens of each sequence; those that decode come first."""
    batch = Batch(preempted=list(preempted))
    counts = [min(s.num_uncomputed_tokens, num_tokens or 1000) for s in sequences]
    for sequence, count in sorted(zip(sequences, counts, strict=True), key=lambda pair: pair[1]):
        if count:
            batch.add(sequence, count)
    return batch


def take(batch: Batch, step: PendingStep) -> None:
    """As the engine takes a result."""
    sampling = [s for s, samples in zip(batch.sequences, batch.samples, strict=True) if samples]
    token_ids = step.result()
    for sequence, position, logprobs in step.logprobs(lambda token_id: None):
        sequence.add_logprobs(position, logprobs)
    for sequence, token_id in zip(sampling, token_ids, strict=True):
        sequence.append_token(token_id)


def run(executor: Executor, sequences: list[Sequence], num_tokens: int | None = None, depth: int = 0) -> None:
    """To the end, with so many steps in flight."""
    in_flight: list[tuple[Batch, PendingStep]] = []
    while True:
        batch = batch_of(sequences, num_tokens)
        if batch.sequences:
            in_flight.append((batch, executor.submit(batch)))
        elif not in_flight:
            break
        if len(in_flight) > depth or not batch.sequences:
            take(*in_flight.pop(0))
    for sequence in sequences:
        executor.release(sequence)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_tokens(executor: Executor, oracle: Oracle, num_tokens: int | None, depth: int) -> None:
    """In whole prompts and in chunks, one step at a time and overlapped."""
    reference = oracle("plain")
    sequences = [sequence_of(index, prompt) for index, prompt in enumerate(reference.prompts[:4])]
    run(executor, sequences, num_tokens, depth)
    assert [s.output_token_ids for s in sequences] == reference.outputs[:4]


def test_preemption(executor: Executor, oracle: Oracle) -> None:
    """Who was preempted goes on in whatever slot is free, and who took the slot is not mixed up with it."""
    reference = oracle("plain")
    first, *others = [sequence_of(index, prompt) for index, prompt in enumerate(reference.prompts[:4])]
    for _ in range(5):
        batch = batch_of([first, *others[:2]])
        take(batch, executor.submit(batch))
    slot, first.num_computed_tokens = first.slot, 0
    batch = batch_of(others, preempted=(first,))
    take(batch, executor.submit(batch))
    assert (first.slot, others[2].slot) == (-1, slot)
    run(executor, [*others, first])
    assert [s.output_token_ids for s in (first, *others)] == reference.outputs[:4]


def test_slots(executor: Executor, oracle: Oracle) -> None:
    sequences = [sequence_of(index, prompt) for index, prompt in enumerate(oracle("plain").prompts[:4])]
    for _ in range(2):
        batch = batch_of(sequences)
        take(batch, executor.submit(batch))
        assert sorted(s.slot for s in sequences) == list(range(executor.capabilities.max_num_seqs))
    for _ in range(2):
        for sequence in sequences:
            executor.release(sequence)
            assert sequence.slot == -1


def test_sampling(oracle: Oracle) -> None:
    """All that sampling can do, with the same outcome of both; also where a token that is in flight counts."""
    kinds: list[dict[str, Any]] = [
        {"seed": 1},
        {"top_k": 5, "temperature": 0.7},
        {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": {3: 2.0}, "logprobs": 2},
        {"prompt_logprobs": 1, "min_tokens": 5, "stop_token_ids": [1]},
    ]
    found = []
    for size in (1, 2):
        prompts = oracle("plain").prompts[5:9]
        params = [SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | kind) for kind in kinds]
        sequences = [sequence_of(index, *pair) for index, pair in enumerate(zip(prompts, params, strict=True))]
        with start(oracle("plain"), size) as llm:
            run(engine_of(llm).executor, sequences, num_tokens=7, depth=1)
        found.append(sequences)
    for one, other in zip(*found, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert len(one.logprobs) == len(other.logprobs) == (0 if one.params.logprobs is None else 20)
        assert [entry.keys() for entry in one.logprobs] == [entry.keys() for entry in other.logprobs]
        for entries in zip((one.prompt_logprobs or [])[1:], (other.prompt_logprobs or [])[1:], strict=True):
            mine, theirs = ([found.logprob for found in entry.values()] for entry in entries)
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert len(found[0][3].prompt_logprobs) == found[0][3].num_prompt_tokens


def test_capabilities(executor: Executor) -> None:
    found = executor.capabilities
    assert (found.vocab_size, found.block_size, found.num_kv_blocks) == (VOCAB_SIZE, 4, 4 * BLOCKS)
    assert (found.device_type, found.max_num_seqs) == ("cpu", 4)
    assert found.device.endswith(("thread)", "threads)"))


def test_call(executor: Executor, oracle: Oracle) -> None:
    """On every rank, in their order, between steps; what a method raises ends nothing."""
    (sequence,) = sequences = [sequence_of(0, oracle("plain").prompts[0])]
    batch = batch_of(sequences)
    step = executor.submit(batch)
    names = executor.call("device_name")
    assert all(name.startswith("cpu") for name in names)
    assert executor.capabilities.device.startswith("2 x" if len(names) == 2 else "cpu")
    take(batch, step)
    for _ in range(2):
        with raises_sentence(NanoflowError, "capture failed on rank 0: "):
            executor.call("capture", [], [])
    assert executor.call("device_name") == names
    run(executor, sequences)
    assert sequence.output_token_ids == oracle("plain").outputs[0]


@pytest.mark.parametrize("size", [1, 2])
def test_close(oracle: Oracle, size: int) -> None:
    with start(oracle("plain"), size) as llm:
        executor = engine_of(llm).executor
        executor.close()
        executor.close()
        if size > 1:
            with pytest.raises(NanoflowError, match="closed"):
                executor.submit(batch_of([sequence_of(0, [1, 2, 3])]))
            with pytest.raises(NanoflowError, match="closed"):
                executor.call("device_name")
