"""Text that grows token by token, and the checkpoint's tokenizer."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanoflow.core.config.errors import CheckpointError, RequestError
from nanoflow.core.text.detokenizer import LONGEST_PENDING, REPLACEMENT, IncrementalDetokenizer, extend_all
from nanoflow.core.text.load_tokenizer import load_tokenizer
from nanoflow.core.text.tokenizer import Tokenizer
from nanoflow.testing.checkpoints import edit_json
from tests.core.scripted import byte_level, sentencepiece_like
from tests.core.sentences import raises_sentence

# Any text that UTF-8 can hold, with plenty of characters of several bytes.
TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé日🎭 .\n\u200d\ufffd")), max_size=30
)
WORDS = st.text(st.sampled_from("the end,a. é日🎭"), max_size=30)


@cache
def tokenizer(kind: str) -> Tokenizer:
    makers = {"bytes": lambda: byte_level(False), "merges": byte_level, "metaspace": sentencepiece_like}
    return Tokenizer(makers[kind]())


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.push([], is_end=True)]


@pytest.mark.parametrize("kind", ["bytes", "merges"])
@given(text=TEXT)
def test_text_comes_back_whole(kind: str, text: str) -> None:
    pieces = pieces_of(tokenizer(kind), tokenizer(kind).encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count(REPLACEMENT) for piece in pieces) == text.count(REPLACEMENT)


@given(text=WORDS)
@example("🎭🎭").via("two characters in a row that fall back to bytes")
@example("the é日 end")
def test_metaspace_and_byte_fallback(text: str) -> None:
    whole = tokenizer("metaspace").decode(tokenizer("metaspace").encode(text))
    pieces = pieces_of(tokenizer("metaspace"), tokenizer("metaspace").encode(text))
    assert "".join(pieces) == whole == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bytes", "merges"])
@given(data=st.data())
def test_any_ids(kind: str, data: st.DataObject) -> None:
    """Also ids that are no text at all, such as lone continuation bytes."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer(kind).hf) - 1), max_size=40))
    assert "".join(pieces_of(tokenizer(kind), ids)) == tokenizer(kind).decode(ids)


@given(text=TEXT)
def test_no_text_is_withheld(text: str) -> None:
    """After each token, all is out but what belongs to an unfinished character."""
    detokenizer = IncrementalDetokenizer(tokenizer("bytes"))
    shown = ""
    for place, token_id in enumerate(tokenizer("bytes").encode(text), start=1):
        shown += detokenizer.push([token_id])
        finished = text.encode()[:place].decode(errors="ignore")
        assert finished.startswith(shown)
        assert len(finished) - len(shown) <= finished.count(REPLACEMENT)


def test_an_unfinished_character_is_flushed() -> None:
    ids = tokenizer("bytes").encode("a🎭")[:-1]
    assert pieces_of(tokenizer("bytes"), ids) == ["a", "", "", "", REPLACEMENT]


def test_special_tokens_are_left_out() -> None:
    hf = tokenizer("merges").hf
    ids = [*hf.encode("the"), hf.eos_token_id, *hf.encode(" end")]
    assert "".join(pieces_of(tokenizer("merges"), ids)) == "the end"


def longest_window(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> int:
    longest = 0
    for token_id in token_ids:
        detokenizer.push([token_id])
        longest = max(longest, len(detokenizer.window))
    return longest


def test_work_per_token_does_not_grow() -> None:
    """A window is decoded, not the whole text."""
    detokenizer = IncrementalDetokenizer(tokenizer("merges"))
    assert longest_window(detokenizer, tokenizer("merges").encode("To be, or not to be. " * 50)) <= 4


@pytest.mark.parametrize("kind", ["bytes", "merges", "metaspace"])
@pytest.mark.parametrize("what", ["halves", "stray bytes", "special tokens", "unknown ids"])
def test_the_window_is_bounded(kind: str, what: str) -> None:
    """Also while no text comes out whole, or none at all."""
    one = tokenizer(kind)
    half = one.encode("a🎭")[:-1][-3:]
    token_ids = {
        "halves": half * 300, "stray bytes": [half[1]] * 900, "special tokens": [one.hf.eos_token_id] * 900,
        "unknown ids": [10**6] * 900,
    }[what]  # fmt: skip
    detokenizer = IncrementalDetokenizer(one)
    detokenizer.push(one.encode("the end"))
    assert longest_window(detokenizer, token_ids) <= 2 * LONGEST_PENDING


@pytest.mark.parametrize("kind", ["bytes", "merges"])
@given(data=st.data())
def test_long_runs_that_are_no_text(kind: str, data: st.DataObject) -> None:
    """Halves of characters and stray bytes, far more of them than a window holds, among some text; in any portions."""
    one = tokenizer(kind)
    parts = [one.encode("🎭")[:-1], one.encode("日")[-1:], one.encode("é"), one.encode("the"), [one.hf.eos_token_id]]
    ids = [i for part in data.draw(st.lists(st.sampled_from(parts), min_size=10, max_size=60)) for i in part * 5]
    detokenizer, text, start = IncrementalDetokenizer(one), "", 0
    while start < len(ids):
        count = data.draw(st.sampled_from([1, 1, 2, 3, 40]))
        text += detokenizer.push(ids[start : start + count])
        start += count
    assert text + detokenizer.push([], is_end=True) == one.decode(ids)


@pytest.mark.parametrize("portion", [1, 3, 20, 50])
def test_long_runs_of_bytes_in_any_portions(portion: int) -> None:
    """Characters that fall back to bytes, cut anywhere: none is given out in part."""
    one = tokenizer("metaspace")
    text = "the é日🎭" + "日本語🎭" * 40 + " end"
    ids = one.encode(text)
    detokenizer = IncrementalDetokenizer(one)
    pieces = [detokenizer.push(ids[start : start + portion]) for start in range(0, len(ids), portion)]
    pieces.append(detokenizer.push([], is_end=True))
    assert "".join(pieces) == one.decode(ids) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_many_are_decoded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = tokenizer("merges"), []
    decode_all = one.decode_all
    monkeypatch.setattr(one, "decode_all", lambda *args, **options: calls.append(args) or decode_all(*args, **options))
    texts = ["the end", "naïve", "日本語"]
    work = [(IncrementalDetokenizer(one), one.encode(text), True) for text in texts]
    assert extend_all(work) == texts
    assert len(calls) == 1
    assert extend_all([]) == []


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_corrupt_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* can't be loaded"):
        load_tokenizer(tmp_path)


def test_loaded_from_a_folder(tmp_path: Path) -> None:
    tokenizer("merges").hf.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.encode("To be") == tokenizer("merges").encode("To be")
    assert loaded.eos_token_id == tokenizer("merges").eos_token_id


def test_chat_needs_a_template() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer("merges").render_chat([{"role": "user", "content": "hi"}])


def test_chat_template_that_refuses() -> None:
    hf = byte_level()
    hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        Tokenizer(hf).render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("model_type", ["qwen3", "unheard-of"])
def test_code_of_a_checkpoint_never_runs(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked whether it may, either: what standard input holds are prompts."""
    byte_level().save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    evil = f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (tmp_path / "evil.py").write_text(evil)
    theirs = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = {"model_type": model_type, "auto_map": theirs}
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit_json(
        tmp_path / "tokenizer_config.json",
        lambda values: values.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    refused = raises_sentence(CheckpointError, "needs code that the checkpoint brings, which is never run")
    with refused if model_type == "unheard-of" else nullcontext():
        load_tokenizer(tmp_path)
    assert sys.stdin.read() == "y\n" * 5
    assert not marker.exists()
