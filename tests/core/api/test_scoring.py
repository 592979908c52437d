"""Scores of continuations: as transformers' log_softmax, whatever else is in the batch or in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, NanoflowError, Score
from nanoflow.core.config.errors import RequestError
from nanoflow.core.text.tokenizer import Tokenizer
from nanoflow.testing.checkpoints import Reference
from tests.core.checkpoints import Oracle
from tests.core.running import engine_of, greedy, recorded
from tests.core.scripted import byte_level, scripted_llm, sentencepiece_like, unigram
from tests.core.sentences import raises_sentence


def start(reference: Reference, **options: Any) -> LLM:
    return LLM(str(reference.folder), **{"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options)


def score(llm: LLM, prompts: Any, continuations: Any) -> list[Score]:
    return llm.score(prompts, continuations, use_tqdm=False)


def split(reference: Reference) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts and continuations, some of which are what greedy decoding gives, some not, some of one token."""
    contexts, continuations = [], []
    for prompt, output in zip(reference.prompts, reference.outputs, strict=True):
        length = len(prompt) // 2 + 1
        contexts += [prompt, prompt, prompt[:length], prompt]
        continuations += [output[:3], [*output[:2], output[2] ^ 1], [*prompt[length:], output[0]], output[:1]]
    return contexts, continuations


@torch.inference_mode()
def check(reference: Reference, scores: list[Score], contexts: list[list[int]], continuations: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32, attn_implementation="eager")
    assert len(scores) == len(contexts)
    for found, context, continuation in zip(scores, contexts, continuations, strict=True):
        logprobs_LV = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert found.token_ids == continuation
        assert found.logprobs == pytest.approx(
            [row[token_id].item() for row, token_id in zip(logprobs_LV, continuation, strict=True)], abs=2e-4
        )
        assert found.total == pytest.approx(sum(found.logprobs))
        assert found.is_greedy == (logprobs_LV.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_num_batched_tokens": 7, "max_num_seqs": 3, "overlap": True}, {"block_manager": "plain"},
        {"block_manager": "radix"}, {"num_kv_blocks": 26, "max_num_seqs": 6, "overlap": True},
    ],
)  # fmt: skip
def test_as_in_transformers(oracle: Oracle, options: dict[str, Any]) -> None:
    """The second time with a warm cache."""
    reference = oracle("plain")
    contexts, continuations = split(reference)
    llm = start(reference, **options)
    for _ in range(2):
        scores = score(llm, contexts, continuations)
        check(reference, scores, contexts, continuations)
    assert {found.is_greedy for found in scores} == {True, False}


def test_a_context_is_computed_once(oracle: Oracle) -> None:
    """And the last token of a continuation never; no more logits are computed than are wanted."""
    reference = oracle("plain")
    llm, context = start(reference), reference.prompts[10]
    score(llm, context, [1])
    model = engine_of(llm).executor.runner.model
    num_rows, compute_logits = [], model.compute_logits
    model.compute_logits = lambda hidden: (num_rows.append(len(hidden)), compute_logits(hidden))[1]  # type: ignore
    with recorded(llm) as batches:
        score(llm, [context] * 3, [[2], [3, 4], [5, 6, 7]])
    uncached = (len(context) - 1) % 4 + 1
    assert sorted(n for batch in batches for n in batch.num_tokens) == [uncached, uncached + 1, uncached + 2]
    assert sum(num_rows) == 1 + 2 + 3


def test_greedy_where_tokens_are_equally_likely(oracle: Oracle) -> None:
    """Those that greedy decoding takes are greedy, and none of their equals."""
    reference = oracle("plain")
    llm = start(reference)
    model = engine_of(llm).executor.runner.model
    compute_logits, tied = model.compute_logits, 0
    model.compute_logits = lambda hidden: compute_logits(hidden).div(2).round()  # type: ignore[method-assign]
    for prompt in reference.prompts[:6]:
        token_ids = llm.generate([prompt], greedy(4, logprobs=5), use_tqdm=False)[0].outputs[0]
        assert score(llm, prompt, token_ids.token_ids)[0].is_greedy
        best, *others = token_ids.logprobs[0].items()
        equals = [token_id for token_id, other in others if other.logprob == best[1].logprob]
        tied += len(equals)
        for found in score(llm, [prompt] * len(equals), [[token_id] for token_id in equals]):
            assert not found.is_greedy
    assert tied > 0


def test_texts(tmp_path: Path) -> None:
    """A continuation's tokens are those that come after the prompt's; its own, where one spans the join."""
    hf = byte_level()
    llm = scripted_llm(tmp_path, hf.encode("the end of"), hf)
    texts = score(llm, ["the", "the"], [" end of the end", "se"])
    assert texts[0].token_ids == hf.encode("the end of the end")[len(hf.encode("the")) :]
    assert hf.encode("these")[: len(hf.encode("the"))] != hf.encode("the")
    assert texts[1].token_ids == hf.encode("se")
    ids = score(llm, [hf.encode("the")], " end")[0]
    assert ids.token_ids == hf.encode(" end", add_special_tokens=False)
    assert score(llm, "the", " end")[0] == ids == score(llm, {"prompt": "the"}, ids.token_ids)[0]


@pytest.mark.parametrize("maker", [byte_level, sentencepiece_like, unigram])
def test_a_score_is_of_the_texts_given(tmp_path: Path, maker: Callable[[], Any]) -> None:
    """Whatever tokens the two would share: prompt's tokens and continuation's spell both."""
    hf, text = maker(), "the end of the end, then"
    tokenizer = Tokenizer(hf)
    llm = scripted_llm(tmp_path, hf.encode("the end"), hf)
    parts = [(text[:place], text[place:]) for place in range(1, len(text))]
    scores = score(llm, [prompt for prompt, _ in parts], [continuation for _, continuation in parts])
    for (prompt, _), found in zip(parts, scores, strict=True):
        assert tokenizer.decode(tokenizer.encode(prompt) + found.token_ids) == text


def test_a_prompt_and_a_continuation_of_one_token_together(tmp_path: Path) -> None:
    hf = byte_level()
    llm = scripted_llm(tmp_path, hf.encode("the end"), hf)
    assert len(hf.encode("the")) == 1
    assert score(llm, "t", "he")[0].token_ids == hf.encode("he")


def test_a_continuation_that_can_not_be_spelled(tmp_path: Path) -> None:
    """By a tokenizer that knows no capitals."""
    from tokenizers import normalizers

    hf = byte_level()
    hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    llm = scripted_llm(tmp_path, hf.encode("the end"), hf)
    with raises_sentence(RequestError, "Prompt 0 ends", "'HE' begins, within a token", "as token ids"):
        score(llm, "t", "HE")


def test_up_to_max_model_len(oracle: Oracle) -> None:
    """An end-of-sequence token is scored as any other."""
    reference = oracle("plain")
    llm = start(reference, max_model_len=12)
    tokens = reference.prompts[10][:12]
    check(reference, score(llm, tokens[:3], tokens[3:]), [tokens[:3]], [tokens[3:]])
    for eos in engine_of(llm).eos_token_ids or {0}:
        check(reference, score(llm, tokens[:3], [eos]), [tokens[:3]], [[eos]])


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1], [2]], [[1]], "There are 2 prompts but 1 continuations; give one for each prompt."),
        ([[]], [[1, 2]], "The prompt is empty; give at least one token, such as that of the beginning of a text."),
        ([[1], [2]], [[1], []], "Prompt 1: The continuation is empty; give at least one token."),
        ([1] * 9, [2] * 4, "have 13 tokens, but max_model_len is 12; shorten the prompt by 1."),
        ([1], [10**6], "Token id 1000000 is not in the vocabulary"),
        ([10**6], [1], "Token id 1000000 is not in the vocabulary"),
        ([1], " a text", "The checkpoint has no tokenizer, which a continuation in words needs"),
        ([1], None, "continuations must be a text, token ids, or a list of these, got NoneType."),
        ([[1]], [None], "Prompt 0 must be a text or a list of token ids, got None."),
    ],
)  # fmt: skip
def test_bad_input(oracle: Oracle, prompts: Any, continuations: Any, message: str) -> None:
    with pytest.raises(NanoflowError) as error:
        score(start(oracle("plain"), max_model_len=12), prompts, continuations)
    assert message in str(error.value)
