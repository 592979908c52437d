"""Outputs that come step by step, and requests with several completions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow import LLM, RequestOutput, RequestOutputKind, SamplingParams
from nanoflow.core.config.errors import NanoflowError, RequestError
from nanoflow.core.data.messages import Update, merged
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.stop_checker import StopChecker
from nanoflow.core.text.tokenizer import Tokenizer
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, greedy, recorded
from tests.core.scripted import byte_level, scripted_llm
from tests.core.sentences import raises_sentence

SAYING = "To be, or not to be: naïve 日本語 🎭🎉!"
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(merges=False))


@pytest.fixture(params=[False, True], ids=["overlap off", "overlap on"])
def talker(request: pytest.FixtureRequest, tmp_path: Path) -> LLM:
    """It says SAYING, a byte a token."""
    return scripted_llm(tmp_path / "checkpoint", tokenizer().encode(SAYING), tokenizer().hf, overlap=request.param)


def texts(outputs: Iterator[RequestOutput] | list[RequestOutput]) -> list[str]:
    return [output["text"] for output in outputs]


def says(**params: Any) -> SamplingParams:
    return greedy(**{"max_tokens": len(tokenizer().encode(SAYING))} | params)


def test_cumulative(talker: LLM) -> None:
    outputs = list(talker.stream([[1]], says()))
    assert [len(output["token_ids"]) for output in outputs] == list(range(1, len(outputs) + 1))
    assert all(after.startswith(before) for before, after in zip(texts(outputs), texts(outputs)[1:], strict=False))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [output.outputs[0].finish_reason for output in outputs[-2:]] == [None, "length"]
    assert outputs[-1]["text"] == SAYING
    assert outputs[0].metrics.finished_time is None
    assert outputs[0].metrics.ttft == outputs[-1].metrics.ttft


@pytest.mark.slow
@given(data=st.data())
def test_several_steps_at_once(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Text and tokens are the same however steps are put together, stop strings and several completions included."""
    llm = scripted_llm(tmp_path_factory.mktemp("c") / "c", tokenizer().encode(SAYING), tokenizer().hf)
    engine = engine_of(llm)
    for name, (n, stop, kind) in enumerate([(1, None, DELTA), (2, ["naïve"], DELTA), (2, ["é", "日本"], None)]):
        kind = kind or RequestOutputKind.CUMULATIVE
        engine.add_request(str(name), [1], says(n=n, stop=stop), output_kind=kind)
    shown: dict[tuple[str, int], str] = {}
    updates: list[Update] = []
    while engine.has_unfinished or updates:
        updates += engine.advance() if engine.has_unfinished else []
        if engine.has_unfinished and data.draw(st.booleans()):
            continue
        for output in engine.output_processor.process(merged(updates)):
            for completion in output.outputs:
                key = output.request_id, completion.index
                shown[key] = shown.get(key, "") * (output.request_id != "2") + completion.text
        updates = []
    llm.close()
    expected = {"0": SAYING, "1": SAYING.partition("naïve")[0], "2": SAYING.partition("日本")[0]}
    assert shown == {(name, i): expected[name] for name, i in (("0", 0), ("1", 0), ("1", 1), ("2", 0), ("2", 1))}


def test_an_output_stays_as_it_was(talker: LLM) -> None:
    stream = talker.stream([[1]], says())
    first = next(stream)
    kept = list(first["token_ids"])
    list(stream)
    assert first["token_ids"] == kept


def test_the_prompt_is_not_copied_for_each_output(talker: LLM) -> None:
    outputs = list(talker.stream([[1]], says(prompt_logprobs=0)))
    assert {id(output.prompt_token_ids) for output in outputs} == {id(outputs[0].prompt_token_ids)}
    assert {id(output.prompt_logprobs) for output in outputs} == {id(outputs[0].prompt_logprobs)}


def test_log_probabilities_add_up(talker: LLM) -> None:
    """A token at a time, and in the end the same as all at once."""
    params = says(logprobs=1, n=2, temperature=5.0, seed=3)
    (expected,) = talker.generate([[1]], params, use_tqdm=False)
    last = [0.0, 0.0]
    for output in talker.stream([[1]], params):
        for completion in output.outputs:
            assert completion.logprobs is not None
            sums = [
                candidates[i].logprob for i, candidates in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
            assert completion.cumulative_logprob == pytest.approx(sum(sums))
            last[completion.index] = completion.cumulative_logprob or 0.0
    assert last == [completion.cumulative_logprob for completion in expected.outputs]


def test_delta(talker: LLM) -> None:
    outputs = list(talker.stream([[1]], says(output_kind=DELTA)))
    assert [len(output["token_ids"]) for output in outputs] == [1] * len(outputs)
    assert "".join(texts(outputs)) == SAYING
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts(outputs))


def test_final_only(talker: LLM) -> None:
    (output,) = talker.stream([[1]], says(output_kind=FINAL_ONLY))
    assert (output.finished, output["text"]) == (True, SAYING)


def test_the_last_output_is_what_generate_gives(talker: LLM) -> None:
    params = [says(), says(max_tokens=3), says(stop=["be:"]), says(stop=["日本"], max_tokens=30)]
    expected = talker.generate([[1]] * 4, params, use_tqdm=False)
    last = {int(output.request_id): output.outputs for output in talker.stream([[1]] * 4, params)}
    assert [last[index] for index in range(4)] == [output.outputs for output in expected]


def test_a_stop_string_is_never_shown_in_part(talker: LLM) -> None:
    shown = texts(talker.stream([[1]], says(stop=["to be: naïf", "be: naïve 日"])))
    assert shown[-1] == "To be, or not to "
    assert all(shown[-1].startswith(text) for text in shown)
    assert "To be, " in shown  # what can't become one any more is shown at once


def test_text_that_might_have_become_a_stop_string_is_shown_in_the_end(talker: LLM) -> None:
    shown = texts(talker.stream([[1]], says(stop=["To be, or not to be!"], output_kind=DELTA, max_tokens=12)))
    assert shown == [""] * 11 + ["To be, or no"]


@given(data=st.data())
def test_any_stop_strings(data: st.DataObject) -> None:
    """At every token, all text is shown but the longest end of it that is the beginning of a stop string."""
    text = data.draw(st.text("ab é日", min_size=1, max_size=25))
    stops = data.draw(st.lists(st.text("ab é日", min_size=1, max_size=4), min_size=1, max_size=3))
    ids = tokenizer().encode(text)
    sequence = Sequence("0", [1], SamplingParams(stop=stops, max_tokens=None), max_tokens=len(ids) + 1)
    checker = StopChecker(tokenizer())
    checker.add(sequence)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        sequence.num_in_flight += 1
        sequence.append_token(token_id)
        checker.check([sequence])
        shown += checker.delta(sequence)
        if sequence.is_finished:
            break
        whole = text.encode()[:count].decode(errors="ignore")
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert all(not held[1:].startswith(stop) for stop in stops)
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(shown[-1:] + held) for stop in stops if shown)
    if not sequence.is_finished:
        sequence.finish("length")
        shown += checker.delta(sequence)
    assert shown == checker.texts["0"].stop_strings.text


def test_streams_in_turns_and_a_call_between(talker: LLM) -> None:
    one, two = (talker.stream([[1]], says(output_kind=DELTA)) for _ in range(2))
    said = ["", ""]
    for first, second in zip(one, two, strict=True):
        said[0] += first["text"]
        said[1] += second["text"]
        if len(said[0]) == 5:
            assert talker.generate([[1]], says(), use_tqdm=False)[0]["text"] == SAYING
    assert said == [SAYING, SAYING]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_closing_a_stream_aborts_what_is_unfinished(talker: LLM, steps: int) -> None:
    engine = engine_of(talker)
    stream = talker.stream([[1]] * 3, [says(), says(max_tokens=1), says()])
    for _ in range(steps):
        next(stream)
    stream.close()
    assert not engine.has_unfinished
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert talker.generate([[1]], says(), use_tqdm=False)[0]["text"] == SAYING
    assert (engine.owners, engine.incremental, engine.output_processor.requests) == ({}, set(), {})
    assert (engine.stop_checker.texts, talker._inboxes) == ({}, {})


def test_mistakes_are_told_at_once(talker: LLM) -> None:
    with raises_sentence(RequestError, "Prompt 1: The prompt is empty"):
        talker.stream([[1], []])
    stream = talker.stream([[1]], says())
    next(stream)
    talker.close()
    with raises_sentence(NanoflowError, "This LLM was closed; make a new one."):
        next(stream)


def test_only_what_streams_brings_updates(talker: LLM) -> None:
    """Requests that show only their end cost nothing in the steps before it."""
    engine = engine_of(talker)
    for index in range(3):
        engine.add_request(str(index), [1], says())
    for _ in range(8):
        assert engine.advance() == []
    assert engine.incremental == set()


def test_the_prompts_logprobs_are_computed_once(oracle: Oracle) -> None:
    reference = oracle("plain")
    prompt = next(p for p in reference.prompts if len(p) == 33)
    with LLM(str(reference.folder), dtype="float32", num_kv_blocks=64, block_size=4) as llm:
        (one,) = llm.generate([prompt], greedy(prompt_logprobs=1), use_tqdm=False)
    with LLM(str(reference.folder), dtype="float32", num_kv_blocks=64, block_size=4) as llm:
        (output,) = llm.generate([prompt], greedy(n=3, prompt_logprobs=1), use_tqdm=False)
        assert llm.stats.num_hit_tokens == 2 * 32
    assert output.prompt_logprobs == one.prompt_logprobs


@pytest.mark.parametrize("manager", ["prefix", "plain"])
@pytest.mark.parametrize("budget", [2048, 24])
def test_completions_share_the_prompts_blocks(oracle: Oracle, manager: str, budget: int) -> None:
    """In whole prompts, and in chunks; a manager without a prefix cache computes the prompt for each."""
    reference = oracle("plain")
    prompt = next(p for p in reference.prompts if len(p) == 33)
    expected = reference.outputs[reference.prompts.index(prompt)]
    options = {"num_kv_blocks": 64, "block_size": 4, "block_manager": manager, "max_num_seqs": 8}
    with LLM(str(reference.folder), dtype="float32", max_num_batched_tokens=budget, **options) as llm:
        with recorded(llm) as batches:
            (output,) = llm.generate([prompt], greedy(n=4), use_tqdm=False)
        assert [(c.index, c.token_ids) for c in output.outputs] == [(i, expected) for i in range(4)]
        computed = llm.stats.num_prefill_tokens + llm.stats.num_decode_tokens
        shared = 3 * 32 if manager == "prefix" else 0
        assert computed == 4 * (33 + 19) - shared
        assert llm.stats.num_hit_tokens == shared
        assert {s.request_id.partition("#")[2] for batch in batches for s in batch.sequences} == set("0123")
        blocks = engine_of(llm).block_manager
        assert blocks.num_free_blocks == blocks.num_blocks


def test_shared_blocks_are_the_same_ones(oracle: Oracle) -> None:
    llm = LLM(str(oracle("plain").folder), dtype="float32", num_kv_blocks=64, block_size=4)
    engine = engine_of(llm)
    engine.add_request("r", oracle("plain").prompts[9], greedy(n=3))
    engine.step()
    tables = [sequence.block_table for sequence in engine.requests["r"].sequences]
    assert tables[0][:8] == tables[1][:8] == tables[2][:8]
    assert len({table[8] for table in tables}) == 3
    engine.abort("r")


def test_each_completion_has_a_seed_of_its_own(oracle: Oracle) -> None:
    llm = LLM(str(oracle("plain").folder), dtype="float32", num_kv_blocks=64)
    wild = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True, "seed": 5}

    def draw(n: int, **params: Any) -> list[tuple[int, ...]]:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(n=n, **wild | params), use_tqdm=False)
        assert [completion.index for completion in output.outputs] == list(range(n))
        return [tuple(completion.token_ids) for completion in output.outputs]

    four = draw(4)
    assert len(set(four)) == 4
    assert draw(4) == four
    assert draw(1) == four[:1]
    assert draw(2) == four[:2]
    assert not set(draw(4, seed=6)) & set(four)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_completions_that_end_at_different_times(tmp_path: Path, kind: RequestOutputKind) -> None:
    """The stop token comes by chance; whatever is shown adds up to the same."""
    llm = scripted_llm(tmp_path, [5], eos=7, vocab_size=9)
    params = SamplingParams(n=5, temperature=5.0, seed=3, max_tokens=40, output_kind=kind)
    (expected,) = llm.generate([[1]], params, use_tqdm=False)
    assert len({len(completion.token_ids) for completion in expected.outputs}) > 1
    outputs = list(llm.stream([[1]], params))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all([c.index for c in o.outputs] == sorted(c.index for c in o.outputs) for o in outputs)
    if kind is DELTA:
        pieces: dict[int, list[int]] = {index: [] for index in range(5)}
        for completion in (completion for output in outputs for completion in output.outputs):
            pieces[completion.index] += completion.token_ids
        assert list(pieces.values()) == [completion.token_ids for completion in expected.outputs]
    else:
        assert outputs[-1].outputs == expected.outputs
    assert len(outputs) == (1 if kind is FINAL_ONLY else max(len(c.token_ids) for c in expected.outputs))


def test_abort_ends_all_completions(tmp_path: Path) -> None:
    engine = engine_of(scripted_llm(tmp_path, [5, 6, 7]))
    engine.add_request("r", [1], greedy(50, n=3))
    with raises_sentence(RequestError, "There is an unfinished request 'r' already"):
        engine.add_request("r", [1], greedy(5))
    with raises_sentence(RequestError, "There is an unfinished request 'r#1' already"):
        engine.add_request("r#1", [1], greedy(5))
    for _ in range(3):
        engine.step()
    output = engine.abort("r")
    assert output is not None
    assert [(c.index, c.token_ids, c.finish_reason) for c in output.outputs] == [
        (index, [5, 6, 7], "abort") for index in range(3)
    ]
    assert not engine.has_unfinished
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert engine.step() == []
