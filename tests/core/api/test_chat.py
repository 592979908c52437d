"""`LLM.chat` and what it hands to the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM
from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.tokenizer import Tokenizer
from tests.core.running import greedy
from tests.core.scripted import byte_level, scripted_llm
from tests.core.sentences import raises_sentence

TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood or '' }}{% endif %}"
)
HAIL = [{"role": "user", "content": "hail"}]


def weather(city: str) -> str:
    """Say what the weather is like.

    Args:
        city: where
    """
    return f"rain in {city}"


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    hf = byte_level()
    hf.chat_template = TEMPLATE
    return scripted_llm(tmp_path / "checkpoint", hf.encode("the end"), hf)


def rendered(llm: LLM, messages: list[dict[str, Any]] = HAIL, **template: Any) -> str | None:
    return llm.chat(messages, greedy(2), use_tqdm=False, **template)[0].prompt


def test_the_prompt(llm: LLM) -> None:
    assert rendered(llm) == "<user>hail</><assistant>"
    assert rendered(llm, add_generation_prompt=False) == "<user>hail</>"


def test_a_message_to_be_continued(llm: LLM) -> None:
    messages = [*HAIL, {"role": "assistant", "content": "well m"}]
    prompt = rendered(llm, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == "<user>hail</><assistant>well m"
    with raises_sentence(RequestError, "continue_final_message needs add_generation_prompt=False"):
        rendered(llm, messages, continue_final_message=True)


@pytest.mark.parametrize("tool", [weather, {"type": "function", "function": {"name": "weather"}}])
def test_tools(llm: LLM, tool: Any) -> None:
    assert rendered(llm, tools=[tool]) == "(weather)<user>hail</><assistant>"


def test_variables_and_a_template_of_the_callers(llm: LLM) -> None:
    assert rendered(llm, chat_template_kwargs={"mood": "sad"}) == "<user>hail</><assistant>sad"
    assert rendered(llm, chat_template="{{ messages[0].content }}!") == "hail!"


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_templates_run_in_a_sandbox(llm: LLM, template: str) -> None:
    with pytest.raises(RequestError, match=r"does not take these messages: .*unsafe"):
        rendered(llm, chat_template=template)


@pytest.mark.parametrize("template", ["{{ a b }}", "{% if %}", "{{ nothing.at_all }}"])
def test_a_template_that_is_none(llm: LLM, template: str) -> None:
    with pytest.raises(RequestError, match="The chat template does not take these messages: "):
        rendered(llm, chat_template=template)


def test_several_conversations(llm: LLM) -> None:
    outputs = llm.chat([HAIL, [*HAIL, *HAIL]], greedy(2), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["<user>hail</><assistant>", "<user>hail</>" * 2 + "<assistant>"]


def test_special_tokens_are_written_by_the_template_alone() -> None:
    hf = byte_level()
    hf.chat_template = "<eos>{{ messages[0].content }}"
    assert Tokenizer(hf).encode_chat(Tokenizer(hf).render_chat(HAIL))[0] == hf.eos_token_id
