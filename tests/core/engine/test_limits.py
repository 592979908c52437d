"""What one request may ask for: each limit is an option, and what is beyond it is refused with the option's name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from nanoflow import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import RequestError
from nanoflow.core.engine.limits import check_limits
from tests.core.running import engine_of, greedy
from tests.core.sentences import raises_sentence

VOCAB_SIZE = 2048


def structured(**what: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(**what)}


# Options that are small, what just fits, what does not, and how the refusal begins.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("max_n", {"n": 7}, {"n": 8}, "n may have at most 7, got 8; ask for less, or raise engine.max_n."),
    ("max_logprobs", {"logprobs": 7}, {"logprobs": 8}, "logprobs may have at most 7 candidates, got 8;"),
    ("max_logprobs", {"logprobs": 0}, {"logprobs": -1}, "logprobs may have at most 7 candidates, got 2048;"),
    ("max_prompt_logprobs", {"prompt_logprobs": 7}, {"prompt_logprobs": 8}, "prompt_logprobs may have at most 7"),
    ("max_logit_bias", {"logit_bias": dict.fromkeys(range(7), 1)}, {"logit_bias": dict.fromkeys(range(8), 1)},
     "logit_bias may have at most 7 entries, got 8;"),
    ("max_stop", {"stop": ["~"] * 7}, {"stop": ["~"] * 8}, "stop may have at most 7 texts, got 8;"),
    ("max_bad_words", {"bad_words": ["~"] * 7}, {"bad_words": ["~"] * 8}, "bad_words may have at most 7 texts"),
    ("max_text_length", {"stop": ["~" * 7]}, {"stop": ["a", "~" * 8]}, "A text of stop may have at most 7 characters"),
    ("max_text_length", {"bad_words": ["~" * 7]}, {"bad_words": ["~" * 8]}, "A text of bad_words may have at most 7"),
    ("max_text_length", {"cache_salt": "~" * 7}, {"cache_salt": "~" * 8}, "cache_salt may have at most 7 characters"),
    ("max_grammar_length", structured(choice=["abc", "defg"]), structured(choice=["abcd", "defg"]),
     "structured_outputs.choice may have at most 7 characters, got 8;"),
    ("max_grammar_length", structured(regex="a{1,20}"), structured(regex="a{1,200}"), "structured_outputs.regex may"),
    ("max_grammar_length", structured(json="{}"), structured(json={"type": "null"}), "structured_outputs.json may"),
    ("max_grammar_length", structured(json_object=True), structured(grammar="start: \"a\""), "structured_outputs.gram"),
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", num_kv_blocks=300) as llm:
        yield llm


@pytest.mark.parametrize(("option", "fits", "too_much", "sentence"), CASES)
def test_limits(option: str, fits: dict[str, Any], too_much: dict[str, Any], sentence: str) -> None:
    limits = EngineConfig(**{option: 7})
    if fits != structured(json_object=True):
        check_limits(SamplingParams(**fits), limits, VOCAB_SIZE)
    with raises_sentence(RequestError, sentence, f"or raise engine.{option}."):
        check_limits(SamplingParams(**too_much), limits, VOCAB_SIZE)
    check_limits(SamplingParams(**too_much), EngineConfig(), VOCAB_SIZE)


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_token_ids"])
def test_longer_than_the_vocabulary(field: str) -> None:
    check_limits(SamplingParams(**{field: [1] * 7}), EngineConfig(), 7)
    with raises_sentence(RequestError, f"{field} has 8 entries, but the vocabulary only 7 tokens."):
        check_limits(SamplingParams(**{field: [1] * 8}), EngineConfig(), 7)


def test_an_engine_refuses(llm: LLM) -> None:
    for params, words in (
        (SamplingParams(n=10**6), "n may have at most 4096, got 1000000"),
        (SamplingParams(n=10**5000), "n may have at most 4096, got a int that can't be shown"),
        (SamplingParams(stop=["a"] * 1000), "stop may have at most 256 texts"),
        (greedy(structured_outputs=StructuredOutputsParams(choice=["ab"] * 10**6)), "at most 262144 characters"),
    ):
        with raises_sentence(RequestError, words):
            llm.generate("HAMLET:", params, use_tqdm=False)
    with LLM(num_kv_blocks=100, max_n=2) as small:
        assert len(small.generate("HAMLET:", greedy(2, n=2), use_tqdm=False)[0].outputs) == 2
        with raises_sentence(RequestError, "n may have at most 2, got 3; ask for less, or raise engine.max_n."):
            small.generate("HAMLET:", greedy(2, n=3), use_tqdm=False)


def test_bytes_of_a_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before they are tokenized."""
    tokenizer = engine_of(llm).tokenizer
    assert tokenizer is not None
    limit = 2**18
    assert tokenizer.max_bytes == limit
    assert llm.generate("日" * (limit // 3), greedy(2, truncate_prompt_tokens=9), use_tqdm=False)[0].finished
    monkeypatch.setattr(tokenizer, "hf", None)
    with raises_sentence(
        RequestError, f"The prompt has {limit + 2} bytes, but at most {limit} are allowed; shorten it"
    ):
        llm.generate("日" * (limit // 3 + 1), greedy(2), use_tqdm=False)
    monkeypatch.undo()
    with LLM(num_kv_blocks=100, max_prompt_bytes=10) as small:
        assert small.generate("0123456789", greedy(2), use_tqdm=False)
        with raises_sentence(RequestError, "The prompt has 11 bytes", "or raise engine.max_prompt_bytes."):
            small.generate("01234567890", greedy(2), use_tqdm=False)
        with raises_sentence(RequestError, "The conversation has "):
            small.chat([{"role": "user", "content": "Hail!"}], greedy(2), use_tqdm=False)


def test_queued_requests_and_tokens() -> None:
    async def stream(llm: AsyncLLM, length: int) -> Any:
        iterator = llm.generate([5] * length, greedy(200))
        await anext(iterator)
        return iterator

    async def test() -> None:
        async with AsyncLLM(num_kv_blocks=200, max_queued_requests=3, max_queued_tokens=100) as llm:
            streams = [await stream(llm, 30) for _ in range(3)]
            with raises_sentence(RequestError, "There are 3 unfinished requests already; try again later"):
                await stream(llm, 1)
            await streams.pop().aclose()
            with raises_sentence(RequestError, "have 60 tokens, and at most 100 may be queued; try again later"):
                await stream(llm, 41)
            streams.append(await stream(llm, 40))
            for iterator in streams:
                await iterator.aclose()
            assert llm._streams.num_tokens == 0
            await (await stream(llm, 100)).aclose()
        many = LLM(num_kv_blocks=200, max_queued_requests=1, max_queued_tokens=1)
        assert len(many.generate([[5]] * 3, greedy(2), use_tqdm=False)) == 3, "what is there at once need not queue"
        many.close()

    asyncio.run(asyncio.wait_for(test(), 60))
