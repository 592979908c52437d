"""Messages of chats: what is one, what becomes of contents in parts, and how far a chat template may go."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoflow.core.config.errors import RequestError
from nanoflow.core.text import template_limits
from nanoflow.core.text.chats import encode_chat, encode_chats
from nanoflow.core.text.prompts import encode
from nanoflow.core.text.tokenizer import Tokenizer
from tests.core.scripted import byte_level
from tests.core.sentences import raises_sentence

TAKES_TEXTS = {
    "prints": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    "adds": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}",
    "takes both": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}",
    "wants two": "{% if messages|length < 2 %}{{ raise_exception('no answer') }}{% endif %}{{ messages[1].content }}",
}
TAKES_PARTS = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
SAID = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "well met"}]
PARTS = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in SAID]


def speaker(template: str = TAKES_TEXTS["adds"]) -> Tokenizer:
    hf = byte_level()
    hf.chat_template = template
    return Tokenizer(hf)


@pytest.mark.parametrize("template", TAKES_TEXTS.values(), ids=TAKES_TEXTS)
def test_text_parts_are_a_text(template: str) -> None:
    one = speaker(template)
    assert one.render_chat(PARTS) == one.render_chat(SAID)
    assert "there" in one.render_chat(PARTS) or "met" in one.render_chat(PARTS)


def test_several_parts() -> None:
    parts = ["one", {"type": "text", "text": "two"}, {"type": "input_text", "text": "three"}]
    assert speaker("{{ messages[0].content }}").render_chat([{"role": "user", "content": parts}]) == "one\ntwo\nthree"
    assert speaker("{{ messages[0].content }}.").render_chat([{"role": "user", "content": []}]) == "."


def test_a_template_that_takes_parts_only() -> None:
    """Gets them, also of the messages that were texts."""
    assert speaker(TAKES_PARTS).render_chat([SAID[0], PARTS[1]]) == "[hello there][well met]"


def test_a_message_in_parts_that_is_to_be_continued() -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert speaker().render_chat(PARTS, **options) == speaker().render_chat(SAID, **options)


def test_messages_are_left_as_they_are() -> None:
    before = [dict(message) for message in PARTS]
    speaker().render_chat(PARTS)
    assert before == PARTS


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be a list of {'role': ..., 'content': ...}."),
        (5, "messages must be a list"), (None, "messages must be a list"), ([], "messages must be a list"),
        ({"role": "user", "content": "a"}, "messages must be a list"),
        (["hello"], "Message 0 must be {'role': ..., 'content': ...}, got 'hello'"),
        ([SAID[0], 5], "Message 1 must be"), ([SAID[0], SAID], "Message 1 must be"),
        ([SAID, SAID[0]], "Conversation 1: messages must be a list"), ([[]], "Conversation 0: messages must be a list"),
        ([{"content": "a"}], "The role of message 0 must be a text such as 'user', got None"),
        ([{"role": 5, "content": "a"}], "The role of message 0 must be a text such as 'user', got 5"),
        ([{"role": "user", "content": 10**5000}], "The content of message 0 must be a text or a list of"),
        ([{"role": "user", "content": {"text": "a"}}], "The content of message 0 must be a text or a list of"),
        ([{"role": "user", "content": ["a", {"type": "image_url"}]}], "Part 1 of the content of message 0"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text is served, got 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Part 0 of the content of message 0 must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "Part 0 of the content"),
        ([{"role": "user", "content": [{"type": ["x"]}]}], "Part 0 of the content"),
        ([{"role": "user", "content": [5]}], "Part 0 of the content of message 0 must be"),
        ([{"role": "user", "content": "\ud800"}], "is not valid Unicode; leave out lone surrogates"),
        ([{"role": "\ud800", "content": "a"}], "is not valid Unicode"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "is not valid Unicode"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(messages: Any, words: str) -> None:
    with raises_sentence(RequestError, words):
        encode_chats(speaker(), messages)


@pytest.mark.parametrize("messages", [[SAID, SAID], [[]], "hello", None])
def test_one_conversation_where_one_is_taken(messages: Any) -> None:
    with raises_sentence(RequestError, "must be"):
        encode_chat(speaker(), messages)


def test_texts_of_numpy_are_texts() -> None:
    one = speaker()
    messages = [{np.str_(key): np.str_(value) for key, value in message.items()} for message in SAID]
    assert encode_chat(one, messages) == encode_chat(one, SAID)
    assert type(encode_chat(one, messages)[0]) is str
    assert encode(one, np.str_("the end")) == ("the end", one.encode("the end"))


@pytest.mark.parametrize("variables", [5, "x", [1], pytest.param(10**5000, id="10**5000")])
def test_variables_that_are_none(variables: Any) -> None:
    with raises_sentence(RequestError, "chat_template_kwargs must be a dict of variables"):
        speaker().render_chat(SAID, chat_template_kwargs=variables)


def test_what_a_template_raises_is_one_line() -> None:
    with raises_sentence(RequestError, "does not take these messages: roles must alternate."):
        speaker("{{ raise_exception('roles\nmust \n\n alternate.') }}").render_chat(SAID)


def test_what_a_template_raises_can_be_printed() -> None:
    with raises_sentence(RequestError, "does not take these messages: no \\ud800."):
        speaker("{{ raise_exception('no ' ~ messages[0].content) }}").render_chat(
            [{"role": "user", "content": "\ud800"}]
        )


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt"])
def test_variables_that_have_another_meaning(name: str) -> None:
    with raises_sentence(RequestError, "The chat template does not take these messages: "):
        speaker().render_chat(SAID, chat_template_kwargs={name: True})


LOOP = "{% for i in range(99999) %}"
ENDLESS = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "loops that set": LOOP * 3 + "{% set x = i %}" + "{% endfor %}" * 3,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "little output": LOOP * 3 + "{{ '' }}" + "{% endfor %}" * 3,
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "LONGEST_TIME", 0.3)
    start = time.monotonic()
    with raises_sentence(RequestError, "The chat template can't be used: it takes more than 0.3 seconds"):
        speaker(template).render_chat(PARTS)
    assert time.monotonic() - start < 5
    assert not any(thread.name == "nanoflow-chat-template" for thread in threading.enumerate())


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set n = namespace(x='x'*10**6) %}{% for i in range(40) %}{% set y = n.x %}{% set n.x = y~y %}{% endfor %}",
        "{% set x = 'x' * 1000000 %}" + "{% set x = x ~ x %}" * 40,
        "{% macro f() %}{% for i in range(99999) %}{{ i ~ 'x' * 10**5 }}{% endfor %}{% endmacro %}{{ f() }}",
        "{{ 'x' * 20000000 }}",
    ],
)  # fmt: skip
def test_a_template_that_writes_too_much(template: str) -> None:
    with raises_sentence(RequestError, "The chat template can't be used: its text has more than 16777216 characters"):
        speaker(template).render_chat(SAID)


def test_a_template_that_is_too_long() -> None:
    with raises_sentence(RequestError, "can't be used: it has 2097152 characters"):
        speaker("ab" * 2**20).render_chat(SAID)


def test_the_callers_thread_is_left_alone() -> None:
    def trace(frame: Any, event: str, arg: Any) -> Callable[..., Any] | None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        speaker().render_chat(SAID)
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is trace


def test_a_long_conversation_is_quick() -> None:
    messages = [{"role": "user", "content": "hello there " * 20}] * 2000
    start = time.monotonic()
    assert len(speaker().render_chat(messages)) > 480_000
    assert time.monotonic() - start < 2
