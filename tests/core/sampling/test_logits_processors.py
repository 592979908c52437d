"""Logits processors that a request names: in any batch, on several ranks, and when they fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.api.options import config_from_options
from nanoflow.core.config.errors import NanoflowError, RequestError
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.checkpoints import NUM_OUTPUT_TOKENS
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, greedy, recorded, tokens
from tests.core.scripted import entry_point
from tests.core.sentences import raises_sentence
from tests.plugins.logits_processors import at_most

REGISTRY = Registry.load(extra=[entry_point(at_most, "at_most", "at-most")])


def start(oracle: Oracle, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 512, "block_size": 4}
    return LLM.from_config(config_from_options(REGISTRY, str(oracle("plain").folder), defaults | options), REGISTRY)


def named(**processors: Any) -> SamplingParams:
    return greedy(logits_processors=processors)


KINDS = [
    named(at_most={"times": 1}), greedy(), named(at_most={"times": 2}, newest={}), named(newest={}),
    greedy(logits_processors={"at_most": {"times": 1}}, repetition_penalty=1.3, logprobs=1),
    named(at_most={"times": 1, "after": 30}), greedy(min_tokens=8, stop_token_ids=[3], logits_processors={}),
]  # fmt: skip


def test_in_any_batch(oracle: Oracle) -> None:
    """Alone, side by side, chunked, overlapped and preempted, each gets what it asks for, and others nothing."""
    reference = oracle("plain")
    params = [KINDS[index % len(KINDS)] for index in range(len(reference.prompts))]

    def run(**options: Any) -> list[list[int]]:
        with start(oracle, **options) as llm:
            outputs = tokens(llm.generate(reference.prompts, params, use_tqdm=False))
            assert (llm.stats.num_preemptions > 0) == ("num_kv_blocks" in options)
            assert not engine_of(llm).processors.used.any()
        return outputs

    expected = run(max_num_seqs=1)
    for index, output in enumerate(expected):
        most = Counter(output).most_common(1)[0][1]
        if index % len(KINDS) in (0, 4):
            assert most == 1
        elif index % len(KINDS) == 2:
            assert most <= 2
        elif index % len(KINDS) == 1:
            assert output == reference.outputs[index]
        if index % len(KINDS) in (2, 3):
            assert all(a != b for a, b in pairwise(output))
    for options in (
        {}, {"overlap": True}, {"max_num_seqs": 3, "max_num_batched_tokens": 7, "overlap": True},
        {"num_kv_blocks": 26, "max_num_seqs": 6, "overlap": True},
    ):  # fmt: skip
        assert run(**options) == expected, options


def test_with_two_ranks(oracle: Oracle) -> None:
    """Rank 0 samples; the plugin is not even installed for the other one."""
    reference = oracle("plain")
    params = [KINDS[index % len(KINDS)] for index in range(len(reference.prompts))]
    outputs = []
    for size in (1, 2):
        with start(oracle, tensor_parallel_size=size, overlap=True, max_num_seqs=8) as llm:
            outputs.append(tokens(llm.generate(reference.prompts, params, use_tqdm=False)))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("params", "most"), [(greedy(), 1), (named(at_most={"times": 1}), 1), (named(newest={}), 0)])
def test_steps_overlap_unless_values_are_needed(oracle: Oracle, params: SamplingParams, most: int) -> None:
    with start(oracle, overlap=True) as llm:
        engine = engine_of(llm)
        engine.add_request("0", oracle("plain").prompts[4], params)
        in_flight = []
        while engine.has_unfinished:
            engine.step()
            in_flight.append(len(engine.in_flight))
    assert max(in_flight) == 1  # that which the last call submitted
    assert len(in_flight) == NUM_OUTPUT_TOKENS * (1 if most else 2) + (1 if most else 0)


def test_beside_a_grammar() -> None:
    """Both apply, and tokens without a choice are sampled, so that each is counted."""
    config = config_from_options(REGISTRY, "bard", {"device": "cpu", "num_kv_blocks": 200})
    held = StructuredOutputsParams(regex="the quality of mercy is not strained [0-9]{8}")
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=held)
    with LLM.from_config(config, REGISTRY) as llm:
        for processors, most in ((None, 8), ({"at_most": {"times": 2}}, 2)):
            with recorded(llm) as batches:
                (output,) = llm.generate("HAMLET:\n", replace(params, logits_processors=processors), use_tqdm=False)
            token_ids = output["token_ids"]
            assert output.outputs[0].finish_reason == "stop"
            assert 1 < Counter(token_ids[-8:]).most_common(1)[0][1] <= most
            assert (len(batches) == len(token_ids)) == (processors is not None)


@pytest.mark.parametrize(
    ("processors", "words"),
    [
        ({"at_mots": {}}, "There is no logits_processor called 'at_mots'"),
        ({"at_mots": {}}, "Did you mean 'at_most'?"),
        ({"broken": {}}, "could not be built: ZeroDivisionError"),
        ({"grammar": {}}, "'grammar' is not chosen by name; it follows other fields"),
        ({"at_most": {}}, "at_most needs times, an integer >= 1, got None."),
        ({"newest": {}, "at_most": {"times": 0}}, "at_most needs times, an integer >= 1, got 0."),
    ],
)
def test_what_is_refused(oracle: Oracle, processors: dict[str, Any], words: str) -> None:
    with start(oracle) as llm:
        with raises_sentence(RequestError, words):
            llm.generate([[1, 2]] * 2, [greedy(), named(**processors)], use_tqdm=False)
        assert not engine_of(llm).has_unfinished


@pytest.fixture(scope="module")
def failing(oracle: Oracle) -> Iterator[LLM]:
    with start(oracle, overlap=True, max_num_seqs=16) as llm:
        yield llm


def test_an_error_in_check_is_the_callers(failing: LLM) -> None:
    for where in ("uses", "check", "prepare"):
        with pytest.raises(ZeroDivisionError, match=f"in {where}"):
            failing.generate([[1, 2]], named(fails={"where": where}), use_tqdm=False)
        assert not engine_of(failing).has_unfinished


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("where", "reason", "num_tokens"),
    [
        ("future", "The logits processor 'fails' failed (ZeroDivisionError: in future).", 0),
        ("refused", "It turned out to be bad.", 0),
        ("assign", "The logits processor 'fails' failed (ZeroDivisionError: in assign).", 0),
        ("wants", "The logits processor 'fails' failed (ZeroDivisionError: in wants).", 3),
        ("apply", "The logits processor 'fails' failed (ZeroDivisionError: in apply).", 3),
        ("observe", "The logits processor 'fails' failed (ZeroDivisionError: in observe).", 0),
        ("release", None, NUM_OUTPUT_TOKENS),
        ("nowhere", None, NUM_OUTPUT_TOKENS),
    ],
)
def test_an_error_ends_its_request_alone(
    oracle: Oracle, failing: LLM, where: str, reason: str | None, num_tokens: int, is_stream: bool
) -> None:
    """Others have the tokens that they always had, and those of the same processor go on where that can be."""
    reference = oracle("plain")
    prompts = reference.prompts[4:10]
    params = [greedy(), named(fails={"where": where}), greedy(), named(fails={"where": "nowhere"}), greedy(), greedy(8)]
    if is_stream:
        last: dict[str, RequestOutput] = {}
        for output in failing.stream(prompts, params):
            assert not (output.request_id in last and last[output.request_id].finished)
            last[output.request_id] = output
        outputs = [last[name] for name in sorted(last, key=int)]
    else:
        outputs = failing.generate(prompts, params, use_tqdm=False)
    assert all(output.finished for output in outputs)
    for index in (0, 2, 4, 5):
        assert outputs[index]["token_ids"] == reference.outputs[4 + index][: params[index].max_tokens]
    completion = outputs[1].outputs[0]
    assert completion.finish_reason == ("error" if reason else "length")
    assert completion.stop_reason == reason
    assert completion.token_ids == reference.outputs[5][:num_tokens]
    if where not in ("wants", "observe"):  # asked for all at once, these concern all
        assert outputs[3]["token_ids"] == reference.outputs[7]
    assert not engine_of(failing).processors.used.any()
    assert not engine_of(failing).has_unfinished


def test_nothing_is_asked_of_them_for_requests_that_use_none(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(oracle) as llm:
        for processor in engine_of(llm).processors.processors:
            for name in ("check", "prepare", "assign", "wants", "apply", "observe", "release"):
                monkeypatch.setattr(processor, name, lambda *_: 1 / 0)
        outputs = llm.generate(oracle("plain").prompts[:4], greedy(), use_tqdm=False)
    assert tokens(outputs) == oracle("plain").outputs[:4]


def test_an_engine_goes_on_after_all_that(oracle: Oracle, failing: LLM) -> None:
    try:
        outputs = failing.generate(oracle("plain").prompts, greedy(), use_tqdm=False)
    except NanoflowError as error:
        raise AssertionError("an earlier failure ended the engine") from error
    assert tokens(outputs) == oracle("plain").outputs
