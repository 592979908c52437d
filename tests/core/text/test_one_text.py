"""One text for the same tokens: whatever they are, whatever comes before them, however few come at a time."""

from __future__ import annotations

import codecs
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow import SamplingParams
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.stop_checker import StopChecker
from nanoflow.core.text.detokenizer import REPLACEMENT, IncrementalDetokenizer
from nanoflow.core.text.tokenizer import Tokenizer
from tests.core.running import greedy
from tests.core.scripted import byte_level, scripted_llm, sentencepiece_like, unigram, word_ends, word_pieces

MAKERS = {
    "bytes": lambda: byte_level(False), "merges": byte_level, "llama 2": sentencepiece_like, "unigram": unigram,
    "unigram with bytes": lambda: unigram(True), "word pieces": word_pieces, "word ends": word_ends,
}  # fmt: skip
KINDS = list(MAKERS)
FALL_BACK = ["llama 2", "unigram with bytes"]
TEXT = st.text(st.sampled_from("the end, a.  é日🎭\n"), min_size=1, max_size=25)

codecs.register_error("one each", lambda error: (REPLACEMENT * (error.end - error.start), error.end))


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(MAKERS[kind]())


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Random ids, special ones and unknown ones among them, texts, and texts that are cut within a character."""
    one = tokenizer(kind)
    whole = TEXT.map(lambda text: one.encode(text))
    cut = st.tuples(whole, st.integers(0, 4)).map(lambda drawn: drawn[0][: len(drawn[0]) - drawn[1]])
    random = st.lists(st.integers(0, len(one.hf) + 2), max_size=12)
    return st.lists(st.one_of(whole, cut, random), max_size=4).map(lambda parts: [*chain(*parts)])


def pieces_of(one: Tokenizer, ids: list[int], portion: int, **options: Any) -> list[str]:
    detokenizer = IncrementalDetokenizer(one, **options)
    pieces = [detokenizer.push(ids[start : start + portion]) for start in range(0, len(ids), portion)]
    return [*pieces, detokenizer.push([], is_end=True)]


def read_as_sentencepiece(one: Tokenizer, ids: list[int]) -> str:
    """As SentencePiece reads them: by bytes, each of which that belongs to no character is a replacement character."""
    data, tokens = b"", [one.hf.convert_ids_to_tokens(token_id) for token_id in ids if token_id < len(one.hf)]
    for token in tokens:
        if token.startswith("<0x"):
            data += bytes([int(token[3:5], 16)])
        elif token not in ("<unk>", "<eos>"):
            data += token.replace("▁", " ").encode()
    return data.decode(errors="one each")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_are_the_text(kind: str, skip: bool, data: st.DataObject) -> None:
    one, ids = tokenizer(kind), data.draw(ids_of(kind))
    whole = one.decode(ids, skip_special_tokens=skip)
    for portion in (1, 2, 7, len(ids) + 1):
        assert "".join(pieces_of(one, ids, portion, skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_text_is_the_tokenizers(kind: str, data: st.DataObject) -> None:
    """But for bytes that belong to no character."""
    one, ids = tokenizer(kind), data.draw(ids_of(kind))
    theirs = one.hf.decode(ids, skip_special_tokens=True)
    if kind not in FALL_BACK or REPLACEMENT not in theirs:
        assert one.decode(ids) == theirs


@given(data=st.data())
def test_a_cut_character_spoils_no_other(data: st.DataObject) -> None:
    one, ids = tokenizer("llama 2"), data.draw(ids_of("llama 2"))
    assert one.decode(ids) == read_as_sentencepiece(one, ids).removeprefix(" ")


@pytest.mark.parametrize("kind", FALL_BACK)
def test_characters_before_a_cut_one(kind: str) -> None:
    one = tokenizer(kind)
    ids = one.hf.convert_tokens_to_ids(["<0xC6>", "<0xAF>", "<0xC5>"])
    assert one.decode(ids) == "Ư" + REPLACEMENT
    assert pieces_of(one, ids, 1) == ["", "Ư", "", REPLACEMENT]
    assert pieces_of(one, [*ids, one.hf.convert_tokens_to_ids("▁the")], 1) == ["", "Ư", "", REPLACEMENT + " the", ""]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_text_goes_on_with_the_prompt(kind: str, data: st.DataObject) -> None:
    one, prompt, ids = tokenizer(kind), tokenizer(kind).encode(data.draw(TEXT)), data.draw(ids_of(kind))
    for portion in (1, 2, 7, len(ids) + 1):
        text = "".join(pieces_of(one, ids, portion, prompt_token_ids=prompt))
        assert one.decode(prompt) + text == one.decode(prompt + ids)


@pytest.mark.parametrize("kind", ["bytes", "merges"])
@given(data=st.data())
def test_text_of_bytes_is_its_own(kind: str, data: st.DataObject) -> None:
    """Also after a prompt that ends within a character."""
    one, prompt, ids = tokenizer(kind), data.draw(ids_of(kind)), data.draw(ids_of(kind))
    assert "".join(pieces_of(one, ids, 1, prompt_token_ids=prompt)) == one.hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", FALL_BACK)
def test_a_prompt_that_ends_within_a_character(kind: str) -> None:
    """Its bytes stay its own."""
    one = tokenizer(kind)
    half, rest = one.hf.convert_tokens_to_ids(["<0xC6>", "<0xAF>"])
    prompt = [*one.encode("the end"), half]
    assert pieces_of(one, [rest, one.hf.convert_tokens_to_ids("▁the")], 7, prompt_token_ids=prompt)[0] == (
        REPLACEMENT + " the"
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stop_string_that_is_never_said_changes_nothing(kind: str, data: st.DataObject) -> None:
    one, prompt, ids = tokenizer(kind), tokenizer(kind).encode("the end"), data.draw(ids_of(kind))
    text, _ = watched(one, prompt, ids, ["never said"])
    assert text == "".join(pieces_of(one, ids, len(ids) + 1, prompt_token_ids=prompt))


def watched(one: Tokenizer, prompt: list[int], ids: list[int], stop: list[str], **params: Any) -> tuple[str, Sequence]:
    """The text of a sequence with stop strings that says `ids`, in deltas, and the sequence."""
    sequence = Sequence("0", prompt, SamplingParams(stop=stop, max_tokens=None, **params), max_tokens=len(ids) + 1)
    checker, text = StopChecker(one), ""
    checker.add(sequence)
    for token_id in ids:
        sequence.num_in_flight += 1
        sequence.append_token(token_id)
        checker.check([sequence])
        if sequence.is_finished:
            break
        text += checker.delta(sequence) or ""
    if not sequence.is_finished:
        sequence.finish("length")
    return text + (checker.delta(sequence) or ""), sequence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_as_stop_string(kind: str, include: bool) -> None:
    """It ends the text where the token comes, though its text is left out; what comes first wins."""
    one = tokenizer(kind)
    ids = [*one.encode("the end"), *one.encode("é")[-1:], one.hf.eos_token_id, *one.encode("the")]
    said = one.decode(ids[: ids.index(one.hf.eos_token_id)])
    options = {"include_stop_str_in_output": include}
    text, sequence = watched(one, [], ids, ["never", "<eos>"], **options)
    assert text == said + "<eos>" * include
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "<eos>")
    assert sequence.token_ids == ids[: ids.index(one.hf.eos_token_id) + 1]
    text, sequence = watched(one, [], ids, ["end", "<eos>"], **options)
    assert (text, sequence.stop_reason) == ("the " + "end" * include, "end")
    text, sequence = watched(one, [], ids, ["<eos>"], **options, skip_special_tokens=False)
    assert (text.removesuffix("<eos>").rstrip(), sequence.stop_reason) == (said.rstrip(), "<eos>")
    assert watched(one, [], ids, ["<eos>"], min_tokens=len(ids))[1].finish_reason == "length"


@pytest.mark.parametrize("kind", ["llama 2", "unigram"])
def test_prompt_and_output_join(kind: str, tmp_path: Path) -> None:
    """In outputs of every sort, and the tokens of log-probabilities have their spaces."""
    hf = tokenizer(kind).hf
    ids = [hf.convert_tokens_to_ids("▁the"), *hf.encode("end", add_special_tokens=False)]
    llm = scripted_llm(tmp_path, [0] * (len(hf.encode("at")) - 1) + ids, hf)
    ask = greedy(len(ids), logprobs=0)
    plain = llm.generate("at", ask, use_tqdm=False)[0].outputs[0]
    assert plain.token_ids == ids
    assert plain.text == " the end" == list(llm.stream("at", ask))[-1]["text"]
    assert llm.generate("at", greedy(len(ids), stop=["never"]), use_tqdm=False)[0]["text"] == " the end"
    tokens = [entry[token_id].decoded_token for entry, token_id in zip(plain.logprobs, ids, strict=True)]
    assert "".join(tokens) == " the end"
