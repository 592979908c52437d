"""What ends a request: stop strings, stop tokens, end-of-sequence, lengths; and what it then says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow import SamplingParams
from nanoflow.core.config.errors import RequestError
from nanoflow.core.data.outputs import CompletionOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.stop_checker import StopChecker
from nanoflow.core.text.tokenizer import Tokenizer
from tests.core.running import greedy
from tests.core.scripted import byte_level, scripted_llm

SAYING = "To be, or not to be: that is the question. Über naïve 日本語 🎭🎉!"


@cache
def tokenizer(merges: bool) -> Tokenizer:
    return Tokenizer(byte_level(merges))


@pytest.fixture(params=[False, True], ids=["overlap off", "overlap on"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return request.param


def say(
    tmp_path: Path, text: str = SAYING, *, merges: bool = True, overlap: bool = False, **params: Any
) -> CompletionOutput:
    """What comes of a model that wants to say `text`."""
    hf = tokenizer(merges).hf
    llm = scripted_llm(tmp_path, hf.encode(text), hf, overlap=overlap)
    return llm.generate([[1]], greedy(**{"max_tokens": len(hf.encode(text))} | params), use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize("merges", [False, True])
@given(data=st.data())
def test_any_stop_string(merges: bool, data: st.DataObject) -> None:
    """The first token that completes the stop string ends the request, and the text ends before the string."""
    text = data.draw(st.text("ab é日🎭", min_size=1, max_size=25))
    stops = data.draw(st.lists(st.text("ab é日🎭", min_size=1, max_size=4), min_size=1, max_size=3))
    ids = tokenizer(merges).encode(text)
    sequence = Sequence("0", [1], SamplingParams(stop=stops, max_tokens=None), max_tokens=len(ids) + 1)
    checker = StopChecker(tokenizer(merges))
    checker.add(sequence)
    for token_id in ids:
        sequence.num_in_flight += 1
        sequence.append_token(token_id)
        checker.check([sequence])
        if sequence.is_finished:
            break
    shown = [tokenizer(merges).hf.decode(ids[:count]) for count in range(len(ids) + 1)]
    places = [[place for stop in stops if (place := part.find(stop)) >= 0] for part in shown]
    completed = next((count for count, found in enumerate(places) if found), None)
    if completed is None:
        assert not sequence.is_finished
        sequence.finish("length")
        assert checker.delta(sequence) == text
    else:
        assert (sequence.finish_reason, len(sequence.output_token_ids)) == ("stop", completed)
        final = checker.delta(sequence)
        assert final == text[: min(places[completed])]
        assert text.startswith(final + str(sequence.stop_reason))


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("stop", ["be", ", or not", "question.", "Ü", "日本", "🎭", "🎉!", "ï", SAYING])
def test_stop_string(tmp_path: Path, stop: str, merges: bool, overlap: bool) -> None:
    completion = say(tmp_path, stop=stop, merges=merges, overlap=overlap)
    assert completion.text == SAYING[: SAYING.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    said = tokenizer(merges).hf.decode(completion.token_ids)
    assert stop in said
    assert stop not in tokenizer(merges).hf.decode(completion.token_ids[:-1])


def test_the_earliest_stop_string_wins(tmp_path: Path) -> None:
    completion = say(tmp_path, stop=["question", "that", "never said"])
    assert completion.text == "To be, or not to be: "
    assert completion.stop_reason == "that"


def test_a_stop_string_that_is_not_said(tmp_path: Path) -> None:
    completion = say(tmp_path, stop=["To be or"])
    assert completion.text == SAYING
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)


def test_the_text_is_whole_where_it_ends_in_a_stop_strings_beginning(tmp_path: Path) -> None:
    assert say(tmp_path, "to be", stop=["be or"]).text == "to be"


def test_no_stop_string_before_min_tokens(tmp_path: Path, overlap: bool) -> None:
    completion = say(tmp_path, "xxxxxxaxxx", merges=False, stop=["x"], min_tokens=4, overlap=overlap)
    assert completion.text == "xxx"
    assert len(completion.token_ids) == 4


def test_a_stop_string_in_the_last_token(tmp_path: Path) -> None:
    completion = say(tmp_path, "abc", merges=False, stop="c", max_tokens=3)
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_length(tmp_path: Path, overlap: bool) -> None:
    completion = say(tmp_path, merges=False, max_tokens=5, overlap=overlap)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("To be", "length", None)
    assert len(completion.token_ids) == 5


def test_length_cuts_a_character(tmp_path: Path) -> None:
    assert say(tmp_path, "a🎭", merges=False, max_tokens=3).text == "a\N{REPLACEMENT CHARACTER}"


def test_stop_token(tmp_path: Path, overlap: bool) -> None:
    llm = scripted_llm(tmp_path, [5, 6, 7, 8, 9], overlap=overlap)
    completion = llm.generate([[1]], greedy(stop_token_ids=[8, 9]), use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == [5, 6, 7, 8]
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("stop", 8, "")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence(tmp_path: Path, overlap: bool, ignore_eos: bool) -> None:
    llm = scripted_llm(tmp_path, [5, 6, 7, 8], eos=7, overlap=overlap)
    completion = llm.generate([[1]], greedy(6, ignore_eos=ignore_eos), use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == ([5, 6, 7, 8, 5, 6] if ignore_eos else [5, 6, 7])
    assert (completion.finish_reason, completion.stop_reason) == ("length" if ignore_eos else "stop", None)


def test_the_tokenizers_end_of_sequence_counts(tmp_path: Path) -> None:
    hf = tokenizer(True).hf
    llm = scripted_llm(tmp_path, [*hf.encode("the end"), hf.eos_token_id, 9], hf)
    output = llm.generate([[1]], greedy(ignore_eos=False), use_tqdm=False)[0]
    assert (output["text"], output.outputs[0].finish_reason) == ("the end", "stop")
    assert output["token_ids"][-1] == hf.eos_token_id


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3, 5])
def test_min_tokens_forbids_end_of_sequence(tmp_path: Path, overlap: bool, min_tokens: int) -> None:
    llm = scripted_llm(tmp_path, [7, 7, 7], eos=7, fallback=4, overlap=overlap)
    completion = llm.generate([[1]], greedy(8, min_tokens=min_tokens, ignore_eos=False), use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == [4] * min_tokens + [7]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_stop_tokens(tmp_path: Path, overlap: bool, temperature: float) -> None:
    llm = scripted_llm(tmp_path, [7, 8, 7], fallback=4, overlap=overlap, vocab_size=9)
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=30, min_tokens=20, stop_token_ids=[7, 8])
    completion = llm.generate([[1]], params, use_tqdm=False)[0].outputs[0]
    assert not {7, 8} & set(completion.token_ids[:20])
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] in (7, 8)


def test_abort(tmp_path: Path, overlap: bool) -> None:
    from tests.core.running import engine_of

    engine = engine_of(scripted_llm(tmp_path, [5, 6, 7], overlap=overlap))
    engine.add_request("a", [1], greedy(50))
    engine.add_request("b", [1], greedy(5))
    for _ in range(3):
        assert engine.step() == []
    output = engine.abort("a")
    assert output is not None
    assert output.outputs[0].finish_reason == "abort"
    assert output["token_ids"] == [5, 6, 7][: 2 if overlap else 3]
    assert engine.abort("a") is None
    engine.add_request("a", [1, 1], greedy(2))  # the id is free again, though a step may still be in flight for it
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output["token_ids"] for output in engine.step()}
    assert done == {"a": [6, 7], "b": [5, 6, 7, 5, 6]}
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


@pytest.mark.parametrize("stop", ["be", ", or not", "question.", "日本", "🎉!", SAYING])
def test_include_stop_string(tmp_path: Path, stop: str, overlap: bool) -> None:
    completion = say(tmp_path, stop=stop, include_stop_str_in_output=True, overlap=overlap)
    assert completion.text == SAYING[: SAYING.index(stop)] + stop
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", [None, "never said"])
def test_a_stop_token_is_text_only_if_asked_for(tmp_path: Path, stop: str | None, include: bool) -> None:
    (end,) = tokenizer(True).hf.encode(" that")
    completion = say(tmp_path, stop=stop, stop_token_ids=[end], include_stop_str_in_output=include)
    assert completion.text == "To be, or not to be:" + (" that" if include else "")
    assert (completion.token_ids[-1], completion.stop_reason) == (end, end)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "the end"),
        ({"skip_special_tokens": False}, "the end"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "the end<eos>"),
        ({"skip_special_tokens": False, "ignore_eos": True}, "the end<eos>the"),
        ({"skip_special_tokens": False, "ignore_eos": True, "stop": "never said"}, "the end<eos>the"),
        ({"skip_special_tokens": False, "ignore_eos": True, "stop": "<eos>the"}, "the end"),
        ({"ignore_eos": True}, "the endthe"),
        ({"detokenize": False}, ""),
    ],
)
def test_special_tokens_in_the_text(tmp_path: Path, overlap: bool, params: dict[str, Any], text: str) -> None:
    hf = tokenizer(True).hf
    script = [*hf.encode("the end"), hf.eos_token_id]
    llm = scripted_llm(tmp_path, script, hf, overlap=overlap)
    output = llm.generate(
        [[1]], greedy(**{"max_tokens": len(script) + 1, "ignore_eos": False} | params), use_tqdm=False
    )
    assert output[0]["text"] == text
    assert output[0]["token_ids"][: len(script)] == script


@pytest.mark.parametrize("word", ["that", " that", "not to be", "question.", "日本語"])
def test_bad_words(tmp_path: Path, word: str, overlap: bool) -> None:
    """What it wants to say is cut where the word would be complete, and goes on with something else."""
    hf = tokenizer(True).hf
    completion = say(tmp_path, bad_words=[word], overlap=overlap)
    said = hf.encode(SAYING)
    assert word.strip() in SAYING
    assert word.strip() not in completion.text
    first = next(i for i, (a, b) in enumerate(zip(said, completion.token_ids, strict=True)) if a != b)
    assert word.strip() in hf.decode(said[: first + 1])
    assert completion.token_ids[first] == 1, "what the model says where it must not say what it wants"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "bad_words forbid all of allowed_token_ids; allow one more."),
        ({"min_tokens": 2, "stop_token_ids": [1]}, "All that bad_words leave of allowed_token_ids are stop tokens"),
    ],
)
def test_bad_words_leave_something_allowed(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    hf = byte_level()
    allowed = [hf.encode(text)[0] for text in ("a", "b")]
    llm = scripted_llm(tmp_path, allowed, hf)
    params = greedy(4, bad_words=["a", "b"], allowed_token_ids=allowed + options.get("stop_token_ids", []), **options)
    with pytest.raises(RequestError) as error:
        llm.generate([[1]], params)
    assert message in str(error.value)
    for more in ({"bad_words": ["a", "ab"]}, {"allowed_token_ids": [*allowed, 7]}):  # one is left
        output = llm.generate([[1]], replace(params, **more), use_tqdm=False)[0]
        assert len(output["token_ids"]) >= options.get("min_tokens", 1)


def test_bad_words_are_encoded_with_and_without_a_space() -> None:
    hf = tokenizer(True).hf
    assert tokenizer(True).word_token_ids(["that", " be"]) == list(map(hf.encode, ["that", " that", "be", " be"]))
    assert list(map(len, tokenizer(True).word_token_ids(["that"]))) == [2, 1]
