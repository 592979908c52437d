"""Log-probabilities: as transformers' log_softmax, of output and prompt, however they were computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, Logprob, RequestOutput, SamplingParams
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.sampling import logprobs as module
from nanoflow.testing.checkpoints import Reference
from tests.core.checkpoints import VOCAB_SIZE, Oracle
from tests.core.running import greedy, recorded, tokens
from tests.core.scripted import byte_level, scripted_llm


def start(reference: Reference, **options: Any) -> LLM:
    return LLM(str(reference.folder), **{"dtype": "float32", "num_kv_blocks": 512, "block_size": 4} | options)


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


class Expected:
    """transformers' log-probabilities of a checkpoint."""

    def __init__(self, reference: Reference) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            reference.folder, dtype=torch.float32, attn_implementation="eager"
        )

    @torch.inference_mode()
    def __call__(self, token_ids: list[int]) -> torch.Tensor:
        """[L - 1, V]: those of the tokens from the second on."""
        return self.model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)

    def check(self, output: RequestOutput, num_output: int | None, num_prompt: int | None) -> None:
        completion, prompt = output.outputs[0], output.prompt_token_ids
        expected = self(prompt + completion.token_ids)
        if num_prompt is None:
            assert output.prompt_logprobs is None
        else:
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            check_entries(output.prompt_logprobs[1:], prompt[1:], expected[: len(prompt) - 1], num_prompt)
        if num_output is None:
            assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
        else:
            assert completion.logprobs is not None
            check_entries(completion.logprobs, completion.token_ids, expected[len(prompt) - 1 :], num_output)
            total = sum(entry[i].logprob for entry, i in zip(completion.logprobs, completion.token_ids, strict=True))
            assert completion.cumulative_logprob == pytest.approx(total)


def check_entries(entries: Any, token_ids: list[int], expected_LV: torch.Tensor, count: int) -> None:
    assert len(entries) == len(token_ids) == len(expected_LV)
    for entry, token_id, expected_V in zip(entries, token_ids, expected_LV, strict=True):
        best = expected_V.topk(VOCAB_SIZE if count < 0 else min(count, VOCAB_SIZE)).indices.tolist()
        assert list(entry) == list(dict.fromkeys([token_id, *best]))
        ranks = (expected_V.unsqueeze(-1) <= expected_V).sum(-1)  # none are equally likely here
        for candidate, (logprob, rank, text) in entry.items():
            assert logprob == pytest.approx(expected_V[candidate].item(), abs=2e-4)
            assert rank == ranks[candidate]
            assert text is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {}, {"overlap": True}, {"max_num_batched_tokens": 7, "max_num_seqs": 3, "overlap": True},
        {"num_kv_blocks": 26, "max_num_seqs": 6}, {"num_kv_blocks": 26, "max_num_batched_tokens": 20, "max_num_seqs": 6,
        "overlap": True}, {"block_manager": "plain"},
    ],
)  # fmt: skip
def test_as_in_transformers(oracle: Oracle, options: dict[str, Any]) -> None:
    """Also in chunks, after a preemption, and beside requests that want none; the second time with a warm cache."""
    reference, expected = oracle("plain"), Expected(oracle("plain"))
    wanted: list[tuple[int | None, int | None]] = [(3, 2), (None, None), (0, None), (None, 0), (None, 5), (1000, -1)]
    wanted = [wanted[i % len(wanted)] for i in range(len(reference.prompts))]
    params = [greedy(logprobs=output, prompt_logprobs=prompt) for output, prompt in wanted]
    llm = start(reference, **options)
    with recorded(llm) as batches:
        for _ in range(2):
            outputs = run(llm, reference.prompts, params)
            assert tokens(outputs) == reference.outputs
            for output, (num_output, num_prompt) in zip(outputs, wanted, strict=True):
                expected.check(output, num_output, num_prompt)
                assert num_prompt is None or output.num_cached_tokens == 0
    assert (llm.stats.num_preemptions > 0) == (llm.engine.block_manager.num_blocks == 26)
    assert (llm.stats.num_hit_tokens > 0) == ("block_manager" not in options)
    if "max_num_batched_tokens" in options:
        assert any(not all(batch.samples) for batch in batches)


def test_they_are_of_the_model_alone(oracle: Oracle) -> None:
    """Neither penalties nor temperature nor filters change them."""
    reference, expected = oracle("plain"), Expected(oracle("plain"))
    params = SamplingParams(
        temperature=3.0, top_k=50, repetition_penalty=1.5, logit_bias={3: 4.0}, seed=1, max_tokens=20, logprobs=2
    )
    outputs = run(start(reference, overlap=True), reference.prompts[4:8], params)
    for output in outputs:
        expected.check(output, 2, None)
    entries = [entry[i] for o in outputs for entry, i in zip(o.outputs[0].logprobs, o["token_ids"], strict=True)]
    assert max(entry.rank for entry in entries) > 5


def test_many_tokens_in_slices(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, expected = oracle("plain"), Expected(oracle("plain"))
    monkeypatch.setattr(module, "ROWS", 7)
    for output in run(start(reference), reference.prompts, greedy(3, logprobs=1, prompt_logprobs=1)):
        expected.check(output, 1, 1)


def test_a_prompt_is_computed_whole_for_its_logprobs(oracle: Oracle) -> None:
    """And what it computed serves others."""
    reference = oracle("plain")
    llm = start(reference)
    prompt = reference.prompts[10]
    for params, cached in ((greedy(2), 0), (greedy(2, prompt_logprobs=0), 0), (greedy(2), 76)):
        assert run(llm, [prompt], params)[0].num_cached_tokens == cached


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 3, "overlap": True}])
def test_of_the_end_of_a_prompt(oracle: Oracle, options: dict[str, Any]) -> None:
    """The tokens before it may come from the cache, and need no logits."""
    reference, expected = oracle("plain"), Expected(oracle("plain"))
    starts = [(0, 1, 5, len(prompt) // 2, len(prompt) - 1, 1000)[i % 6] for i, prompt in enumerate(reference.prompts)]
    params = [greedy(3, prompt_logprobs=1, prompt_logprobs_start=start) for start in starts]
    llm = start(reference, **options)
    for warm in (False, True):
        for output, first in zip(run(llm, reference.prompts, params), starts, strict=True):
            prompt = output.prompt_token_ids
            first = min(max(first, 1), len(prompt))
            assert output.prompt_logprobs[:first] == [None] * first
            wanted_LV = expected(prompt)[first - 1 :] if first < len(prompt) else ()
            check_entries(output.prompt_logprobs[first:], prompt[first:], wanted_LV, 1)
            assert not warm or output.num_cached_tokens == (first - 1) // 4 * 4


def test_equally_likely_tokens_rank_by_their_ids() -> None:
    """Even where only their log-probabilities are equal, after rounding, the likelier one is first."""
    logits_LV = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [1e-8, 2e-8, 0.0, 2e-8, 1e-8]])
    for own, ranks in enumerate([[5, 3], [1, 1], [4, 5], [2, 2], [3, 4]]):
        spans = [module.Span(Sequence("0", [0, 0, 0], greedy(), max_tokens=1), 1, 2, 1)]
        found = module.top_logprobs(spans, lambda part: logits_LV[part], torch.tensor([own, own]))
        assert found.ranks_L.tolist() == ranks
        ((_, _, entries),) = found.read(lambda _: None)
        assert [entry[own].rank for entry in entries] == ranks


def test_what_the_cache_may_skip() -> None:
    """All but the last token; of a prompt that is being scored, what has been."""
    plain = Sequence("0", [1, 2, 3, 4], SamplingParams(), max_tokens=5)
    assert plain.num_skippable_tokens == 3
    scored = Sequence("0", [1, 2, 3, 4], SamplingParams(prompt_logprobs=1), max_tokens=5)
    entry = {1: Logprob(-1.0, 1, None)}
    skippable = [scored.num_skippable_tokens]
    for position, count in ((1, 2), (1, 1), (1, 3), (2, 2)):  # computed again from time to time
        scored.add_logprobs(position, [entry] * count)
        skippable.append(scored.num_skippable_tokens)
    assert skippable == [0, 2, 2, 3, 3]
    assert scored.prompt_logprobs == [None, entry, entry, entry]
    assert not scored.needs_prompt_logits
    scored.token_ids += [5, 6]
    assert scored.num_skippable_tokens == 5
    for start, skippable in ((0, 0), (1, 0), (3, 2), (4, 3), (9, 3)):
        partly = Sequence(
            "0", [1, 2, 3, 4], SamplingParams(prompt_logprobs=1, prompt_logprobs_start=start), max_tokens=5
        )
        assert partly.num_skippable_tokens == skippable


@pytest.mark.parametrize("detokenize", [True, False])
def test_texts_of_candidates(tmp_path: Path, detokenize: bool) -> None:
    hf = byte_level()
    llm = scripted_llm(tmp_path, [*hf.encode("the end"), hf.eos_token_id], hf, fallback=hf.encode(" that")[0])
    params = greedy(3, logprobs=2, prompt_logprobs=1, detokenize=detokenize)
    output = llm.generate([[*hf.encode("the"), 1]], params, use_tqdm=False)[0]
    for entry in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        for token_id, candidate in entry.items():
            assert candidate.decoded_token == (hf.decode([token_id]) if detokenize else None)


def test_an_aborted_request_keeps_what_it_has(oracle: Oracle) -> None:
    reference = oracle("plain")
    for overlap in (False, True):
        engine = start(reference, overlap=overlap).engine
        engine.add_request("0", reference.prompts[5], greedy(logprobs=1, prompt_logprobs=1))
        for _ in range(6):
            engine.step()
        output = engine.abort("0")
        assert output is not None
        assert len(output.outputs[0].logprobs) == len(output["token_ids"]) > 0
        assert len(output.prompt_logprobs) == len(reference.prompts[5])
