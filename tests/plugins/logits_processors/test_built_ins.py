"""Penalties, biases and masks: as transformers' logits processors, and the same however a request was batched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow import LLM, SamplingParams
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.ops import Ops
from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.sampling.sampling_input import RowParams, SamplingInput
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, greedy, recorded, tokens
from tests.plugins.logits_processors.rows import as_words, built_ins, sequence_of, use_numerals

VOCAB = 12
CPU = torch.device("cpu")

ids = st.integers(0, VOCAB - 1)
texts = st.lists(ids, max_size=20)
prompts = st.lists(ids, min_size=1, max_size=10)
words = st.lists(st.lists(ids, min_size=1, max_size=4), max_size=6)


def state_of(num_slots: int, vocab_size: int = VOCAB) -> LogitsProcessors:
    return LogitsProcessors(built_ins(num_slots, vocab_size), num_slots)


def applied(state: LogitsProcessors, logits_SV: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """What becomes of the logits; of those that no processor wants, nothing."""
    wanted = state.wants(slots, positions)
    if not wanted.any():
        return logits_SV
    result = state.apply(logits_SV, slots, positions, wanted)
    assert not state.take_failures()
    return result


def changed(logits_SV: torch.Tensor, sequences: list[Sequence], num_unknown: int = 0) -> torch.Tensor:
    """What becomes of the logits. The last `num_unknown` tokens are observed as sampled ones, as when steps overlap."""
    slots = np.arange(len(sequences))[::-1].copy()
    state = state_of(len(slots), logits_SV.shape[1])
    sampled = [sequence.token_ids[len(sequence.token_ids) - num_unknown :] for sequence in sequences]
    for sequence, slot, late in zip(sequences, slots.tolist(), sampled, strict=True):
        del sequence.token_ids[len(sequence.token_ids) - len(late) :]
        state.assign(slot, sequence)
    for late in zip(*sampled, strict=True):
        state.observe(slots, torch.tensor(late))
    positions = np.array([len(s.token_ids) + num_unknown for s in sequences])
    return applied(state, logits_SV, slots, positions)


def random_logits(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 10**6), prompt=prompts, output=texts, penalty=st.floats(0.1, 5), late=st.booleans())
def test_repetition_penalty_as_in_transformers(
    seed: int, prompt: list[int], output: list[int], penalty: float, late: bool
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    ours = changed(logits, [sequence_of(prompt, output, repetition_penalty=penalty)], late and len(output) > 0)
    torch.testing.assert_close(ours, expected)


@given(
    seed=st.integers(0, 10**6), prompt=prompts, output=texts, presence=st.floats(-2, 2), frequency=st.floats(-2, 2),
    late=st.booleans(),
)  # fmt: skip
def test_presence_and_frequency_penalty(
    seed: int, prompt: list[int], output: list[int], presence: float, frequency: float, late: bool
) -> None:
    """Transformers has none of them: this is how OpenAI defines them."""
    logits = random_logits(seed)
    counts = torch.tensor(output, dtype=torch.int64).bincount(minlength=VOCAB)
    expected = logits - presence * (counts > 0) - frequency * counts
    sequence = sequence_of(prompt, output, presence_penalty=presence, frequency_penalty=frequency)
    torch.testing.assert_close(changed(logits, [sequence], late and len(output) > 0), expected)


@given(seed=st.integers(0, 10**6), prompt=prompts, output=texts, bad=words, late=st.booleans())
def test_bad_words_as_in_transformers(
    seed: int, prompt: list[int], output: list[int], bad: list[list[int]], late: bool
) -> None:
    """Which looks at the prompt as well, so it gets none."""
    from transformers import NoBadWordsLogitsProcessor

    logits = random_logits(seed)
    expected = logits
    if bad:
        input_ids = torch.tensor([[-1, *output]])  # a prompt that no word can begin in
        expected = NoBadWordsLogitsProcessor(bad)(input_ids, logits.clone())
    ours = changed(logits, [sequence_of(prompt, output, bad_words=bad)], late and len(output) > 0)
    torch.testing.assert_close(ours, expected)


@given(seed=st.integers(0, 10**6), bias=st.dictionaries(ids, st.floats(-100, 100), min_size=1))
def test_logit_bias_as_in_transformers(seed: int, bias: dict[int, float]) -> None:
    from transformers import SequenceBiasLogitsProcessor

    logits = random_logits(seed)
    expected = SequenceBiasLogitsProcessor([[[token], float(value)] for token, value in bias.items()])(
        torch.tensor([[0]]), logits.clone()
    )
    torch.testing.assert_close(changed(logits, [sequence_of([0], [], logit_bias=bias)]), expected)


@given(seed=st.integers(0, 10**6), allowed=st.lists(ids, min_size=1))
def test_allowed_token_ids_as_in_transformers(seed: int, allowed: list[int]) -> None:
    from transformers import PrefixConstrainedLogitsProcessor

    logits = random_logits(seed)
    expected = PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1)(torch.tensor([[0]]), logits.clone())
    torch.testing.assert_close(changed(logits, [sequence_of([0], [], allowed_token_ids=allowed)]), expected)


@given(seed=st.integers(0, 10**6), output=texts, stops=st.lists(ids, min_size=1, max_size=4), least=st.integers(1, 20))
def test_min_tokens_as_in_transformers(seed: int, output: list[int], stops: list[int], least: int) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = random_logits(seed)
    expected = MinNewTokensLengthLogitsProcessor(3, least, stops)(torch.tensor([[0, 1, 2, *output]]), logits.clone())
    sequence = sequence_of([0, 1, 2], output, min_tokens=least, stop_token_ids=stops)
    torch.testing.assert_close(changed(logits, [sequence]), expected)


def test_order() -> None:
    """A bias comes before penalties, and what is forbidden stays so."""
    logits = torch.tensor([[1.0, -1.0, 2.0, 5.0]])
    params = {"logit_bias": {0: 1.0, 1: 2.0, 3: 9.0}, "allowed_token_ids": [0, 1, 2], "repetition_penalty": 2.0}
    (row,) = changed(logits, [sequence_of([0, 1], [2, 3, 2], frequency_penalty=0.25, **params)])
    assert row.tolist() == [(1 + 1) / 2, (-1 + 2) / 2, 2 / 2 - 2 * 0.25, -torch.inf]


@pytest.mark.slow
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_a_row_is_changed_the_same_in_any_batch(data: st.DataObject, seed: int) -> None:
    count = 5
    logits = random_logits(seed, count)
    kinds: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "logit_bias": {3: 1.0}}, {"frequency_penalty": -0.5},
        {"allowed_token_ids": [1, 2, 5]}, {"bad_words": [[4, 5], [2]]}, {"min_tokens": 9, "stop_token_ids": [1]},
    ]  # fmt: skip
    made = [(data.draw(prompts), data.draw(texts.filter(len)), data.draw(st.sampled_from(kinds))) for _ in range(count)]
    late = data.draw(st.booleans())
    together = changed(logits, [sequence_of(p, o, **kind) for p, o, kind in made], late)
    for index, (prompt, output, kind) in enumerate(made):
        alone = changed(logits[index : index + 1], [sequence_of(prompt, output, **kind)])
        assert torch.equal(together[index : index + 1], alone)


def test_a_reused_slot_forgets() -> None:
    state = state_of(1)
    logits, row = random_logits(0), np.zeros(1, np.int64)
    first = sequence_of([1], [2, 3], [[4], [3, 5]], presence_penalty=1.0, allowed_token_ids=[3, 5], min_tokens=50)
    for sequence in (first, sequence_of([6], [7], [[8]], frequency_penalty=1.0), sequence_of([6], [7])):
        state.release(0)
        state.assign(0, sequence)
        ours = applied(state, logits, row, np.array([len(sequence.token_ids)]))
        fresh = changed(logits, [sequence])
        assert torch.equal(ours, fresh)
    assert torch.equal(ours, logits)
    assert not state.wants(row, np.array([2])).any()
    assert not state.used.any()


def test_nothing_is_allocated_for_requests_that_use_none_of_it() -> None:
    state = state_of(4)
    state.assign(0, sequence_of([1], [2], min_tokens=3, stop_token_ids=[1]))
    tables = state.by_name["bias_and_penalties"]
    assert tables.bias_RV is None
    assert tables.counts_RV is None


@pytest.mark.parametrize(
    ("params", "bad_words"),
    [
        ({"repetition_penalty": 1.7, "temperature": 0.8}, []),
        ({"frequency_penalty": 0.9, "presence_penalty": -1.0}, []),
        ({"logit_bias": {2: 2.5, 3: -100.0}, "top_k": 6}, [[5]]),
        ({"allowed_token_ids": [0, 1, 3, 5, 7, 8, 9, 11], "top_p": 0.95}, []),
        ({"presence_penalty": 1.0, "min_p": 0.05}, [[2], [3, 7]]),
    ],
)
def test_draws_follow_the_changed_distribution(params: dict[str, Any], bad_words: list[list[int]]) -> None:
    """Pearson's chi-square of draws by 8,000 seeds, against transformers' warpers of the changed logits."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    count = 8_000
    logits = random_logits(3) / 2
    sequences = [sequence_of([1, 2], [3, 2, 2, 3], bad_words, **params) for _ in range(count)]
    sampler, slots = BatchSampler(count, VOCAB, CPU, Ops(), state_of(count)), np.arange(count)
    for slot, sequence in enumerate(sequences):
        sequence.seed = slot
        sampler.assign(slot, sequence)
    positions = np.full(count, 6)
    temperature_S = torch.full((count,), float(params.get("temperature", 1.0)))
    row_params = RowParams(temperature_S, torch.from_numpy(slots), torch.from_numpy(positions), torch.from_numpy(slots))
    drawn = sampler.sample(logits.repeat(count, 1), SamplingInput(sequences, slots, positions, row_params))

    scores = changed(logits, sequences[:1]) / params.get("temperature", 1.0)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in params:
            scores = warper(params[name])(None, scores)
    expected, observed = scores[0].softmax(-1) * count, drawn.bincount(minlength=VOCAB)
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((observed - expected) ** 2 / expected)[possible].sum().item()
    freedom = int(possible.sum()) - 1
    assert freedom >= 3
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.0},
    {"top_k": 5},
    {"logit_bias": {7: 6.0, 9: 6.0}, "frequency_penalty": 1.0},
    {},
    {"allowed_token_ids": list(range(30)), "top_p": 0.9},
    {"frequency_penalty": -2.0, "repetition_penalty": 0.7},
    {"logit_bias": {5: 100}, "min_tokens": 9, "stop_token_ids": [5]},
]


@pytest.mark.slow
@pytest.mark.parametrize("logprobs", [None, 2])
def test_same_tokens_however_a_request_was_run(oracle: Oracle, logprobs: int | None) -> None:
    """Batched, chunked, preempted, cached or overlapped."""
    reference = oracle("plain")
    params = [
        SamplingParams(
            **{"max_tokens": 20, "ignore_eos": True, "seed": i, "logprobs": logprobs} | KINDS[i % len(KINDS)]
        )
        for i in range(16)
    ]

    def run(**options: Any) -> list[list[int]]:
        llm = LLM(str(reference.folder), **{"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options)
        result = tokens(llm.generate(reference.prompts, params, use_tqdm=False))
        assert ("num_kv_blocks" in options) == (llm.stats.num_preemptions > 0)
        return result

    expected = run(max_num_seqs=1)
    assert all(5 not in output[:9] for output in expected[7::8])
    assert [output[-1] for output in expected[7::8]] == [5, 5]
    for options in (
        {}, {"overlap": True}, {"max_num_seqs": 3, "max_num_batched_tokens": 7, "overlap": True},
        {"block_manager": "plain", "overlap": True, "num_kv_blocks": 25}, {"num_kv_blocks": 26, "max_num_seqs": 6},
        {"overlap": True, "num_kv_blocks": 26, "max_num_seqs": 6, "max_num_batched_tokens": 11},
    ):  # fmt: skip
        assert run(**options) == expected, options


def bad_word_ids(
    reference: Any, params: list[SamplingParams], llm: LLM, words: list[list[list[int]]]
) -> list[list[int]]:
    """Outputs of requests whose bad words are given as token ids, since these checkpoints have no tokenizer."""
    engine = engine_of(llm)
    use_numerals(engine)
    outputs = {}
    for index, (prompt, param, bad) in enumerate(zip(reference.prompts, params, words, strict=False)):
        engine.add_request(str(index), prompt, replace(param, bad_words=as_words(bad)))
    while engine.has_unfinished:
        outputs |= {int(output.request_id): output["token_ids"] for output in engine.step()}
    return [outputs[index] for index in range(len(outputs))]


@pytest.mark.slow
def test_bad_words_with_overlap_and_preemption(oracle: Oracle) -> None:
    """Each request must not say what it would have said."""
    reference = oracle("plain")
    words = [[output[3:6], output[8:10], output[12:13]] for output in reference.outputs]
    params = [greedy() for _ in reference.prompts]

    def run(**options: Any) -> list[list[int]]:
        options = {"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options
        return bad_word_ids(reference, params, LLM(str(reference.folder), **options), words)

    expected = run(max_num_seqs=1)
    for output, plain, bad in zip(expected, reference.outputs, words, strict=True):
        assert output != plain
        assert not any(output[i : i + len(word)] == word for word in bad for i in range(len(output)))
    for options in (
        {"overlap": True}, {"overlap": True, "num_kv_blocks": 25}, {"max_num_batched_tokens": 9, "max_num_seqs": 4},
    ):  # fmt: skip
        assert run(**options) == expected, options


def test_others_are_unaffected(oracle: Oracle) -> None:
    reference = oracle("plain")
    params = [greedy() if i % 2 else greedy(repetition_penalty=3.0) for i in range(16)]
    llm = LLM(str(reference.folder), dtype="float32", num_kv_blocks=512, overlap=True)
    with recorded(llm) as batches:
        outputs = tokens(llm.generate(reference.prompts, params, use_tqdm=False))
    assert max(len(batch.sequences) for batch in batches) == 16
    assert outputs[1::2] == reference.outputs[1::2]
    assert all(a != b for a, b in zip(outputs[::2], reference.outputs[::2], strict=True))
