"""The whole engine on a GPU: graphs, overlap, every backend; half precision; and a long run under pressure."""

from __future__ import annotations

import gc
import os
import random
from typing import Any

import pytest
import torch

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.core.config.errors import PluginError
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.ops import Ops
from nanoflow.core.sampling.logprobs import Span
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of


def start(oracle: Oracle, attention: str, **options: Any) -> LLM:
    """The bundled checkpoint (head dim 64), or a skip where the backend can't serve."""
    defaults = {"device": "cuda", "attention": attention, "num_kv_blocks": 512, "block_size": 16, "max_model_len": 512}
    try:
        return LLM(str(oracle("bard").folder), **{**defaults, **options})
    except PluginError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("attention", ["triton", "torch"])
def test_greedy_float32_is_exact(oracle: Oracle, attention: str, enforce_eager: bool, overlap: bool) -> None:
    options = {"dtype": "float32", "enforce_eager": enforce_eager, "overlap": overlap, "max_num_seqs": 8}
    llm = start(oracle, attention, **options, max_num_batched_tokens=48)
    graphs = engine_of(llm).executor.runner.graphs
    assert (graphs is not None) == (attention != "torch" and not enforce_eager)
    assert graphs is None or graphs.tokens == [16, 32, 48]
    for _ in range(2):  # the second time from the prefix cache
        check(llm, oracle("bard"))
    assert llm.stats.num_hit_tokens > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_plain_pytorch_is_exact(oracle: Oracle, overlap: bool) -> None:
    llm = start(oracle, "auto", dtype="float32", accelerate=False, overlap=overlap, max_num_seqs=8)
    assert llm.describe()["attention"] == "torch"
    assert engine_of(llm).executor.runner.graphs is None
    assert engine_of(llm).executor.runner.ops == Ops()
    check(llm, oracle("bard"))


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_with_graphs(oracle: Oracle, overlap: bool) -> None:
    longest = max(len(prompt) for prompt in oracle("bard").prompts) + 20
    llm = start(oracle, "triton", dtype="float32", overlap=overlap, num_kv_blocks=-(-longest // 16), max_num_seqs=8)
    check(llm, oracle("bard"))
    assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("attention", ["triton", "flash", "hybrid", "torch"])
def test_bfloat16_is_as_near_to_float32_as_transformers(oracle: Oracle, attention: str) -> None:
    """Logits of the last prompt token: our bfloat16 error stays within that of transformers."""
    from transformers import AutoModelForCausalLM

    llm = start(oracle, attention, dtype="bfloat16", num_kv_blocks=64)
    executor = engine_of(llm).executor
    folder = oracle("bard").folder
    prompt = [token for prompt in oracle("bard").prompts for token in prompt][:200]
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()(ids).logits[0].double()
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()(ids).logits[0].double()
        sequence = Sequence("0", prompt, SamplingParams(max_tokens=1), max_tokens=1)
        sequence.block_table = list(range(-(-len(prompt) // 16)))
        batch = Batch()
        batch.add(sequence, len(prompt))
        spans = [Span(sequence, 1, len(prompt), 0)]  # so that all logits are had
        slots, any_new = executor.inputs.update(batch)
        output = executor.runner.execute(executor.make_step(batch, slots, spans, any_new=any_new))
        ours = torch.cat([*output.scored]).double()

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    print(f"{attention}: ours {error(ours):.4f}, transformers {error(half):.4f}")
    assert error(ours) < 1.2 * error(half)


@pytest.mark.parametrize("attention", ["triton", "hybrid"])
def test_soak(oracle: Oracle, attention: str) -> None:
    """5,000 requests of random lengths, some aborted, in a cache too small for them: all are accounted for."""
    llm = start(oracle, attention, dtype="bfloat16", num_kv_blocks=600, max_num_seqs=96, max_num_batched_tokens=512)
    engine, generator = engine_of(llm), random.Random(0)
    free = engine.block_manager.num_free_blocks
    ended: dict[str, str | None] = {}
    added = 0
    while added < 5000 or engine.has_unfinished:
        while added < 5000 and len(engine.requests) < 200:
            prompt = [generator.randrange(2048) for _ in range(generator.randint(1, 120))]
            temperature = generator.choice([0.0, 0.8])
            params = SamplingParams(
                temperature=temperature, top_k=generator.choice([0, 20]), max_tokens=generator.randint(1, 120)
            )
            engine.add_request(str(added), prompt, params)
            added += 1
        outputs = engine.step()
        if generator.random() < 0.2 and engine.requests:
            outputs += filter(None, [engine.abort(generator.choice(list(engine.requests)))])
        for output in outputs:
            assert output.request_id not in ended
            ended[output.request_id] = output.outputs[0].finish_reason
            assert all(0 <= token < 2048 for token in output["token_ids"])
    assert set(ended) == set(map(str, range(5000)))
    assert set(ended.values()) == {"stop", "length", "abort"}
    assert engine.stats.num_preemptions > 0
    assert engine.block_manager.num_free_blocks == free
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    keys, values = engine.executor.runner.attention.cache(0)
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("graph_tokens", [[], [24], [20, 30, 48]])
def test_steps_with_prefill_in_graphs_and_beside_them(oracle: Oracle, graph_tokens: list[int]) -> None:
    llm = start(oracle, "triton", dtype="float32", max_num_seqs=7, max_num_batched_tokens=48, graph_tokens=graph_tokens)
    for _ in range(2):
        check(llm, oracle("bard"))


def test_many_graphs_take_the_memory_of_the_largest(oracle: Oracle) -> None:
    """What they keep beside it is a few numbers for each row; logits of their own would take 16 MiB together."""
    taken = []
    for sizes in ([64], list(range(1, 65))):
        before = torch.cuda.memory_allocated()
        llm = start(oracle, "triton", dtype="float32", max_num_seqs=64, graph_sizes=sizes, graph_tokens=[64])
        taken.append(torch.cuda.memory_allocated() - before)
        check(llm, oracle("bard"))
        llm.close()
        del llm
        gc.collect()
    assert taken[1] - taken[0] < 2**21


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="no other process may use the GPU's memory")
def test_memory_is_shared_between_engines(oracle: Oracle) -> None:
    first = start(oracle, "triton", dtype="bfloat16", num_kv_blocks=None, gpu_memory_utilization=0.3)
    second = start(oracle, "triton", dtype="bfloat16", num_kv_blocks=None, gpu_memory_utilization=0.6)
    for llm in (first, second):
        check(llm, oracle("bard"), order=[0], max_tokens=[1])


KINDS = [
    {},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"logit_bias": {5: -9.0, 6: 2.0}},
    {"allowed_token_ids": list(range(3, 900, 2))},
    {"bad_words": ["the", "my lord", "I am"]},
    {"top_k": 1},
    {"min_tokens": 15, "stop_token_ids": list(range(300, 600))},
]


def changed(oracle: Oracle, logprobs: int | None, **options: Any) -> list[RequestOutput]:
    """What becomes of requests that change their logits, and of some that don't."""
    prompts = oracle("bard").prompts
    params = [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "logprobs": logprobs, "prompt_logprobs": ask} | kind)
        for kind in KINDS for ask in (None, logprobs)
    ]  # fmt: skip
    llm = start(oracle, options.pop("attention", "triton"), dtype="float32", max_num_seqs=8, **options)
    outputs = llm.generate([prompts[i % len(prompts)] for i in range(len(params))], params, use_tqdm=False)
    assert (llm.stats.num_preemptions > 0) == (options.get("num_kv_blocks", 512) < 20)
    return outputs


@pytest.mark.parametrize("logprobs", [None, 3])
def test_changed_logits_and_logprobs_in_graphs(oracle: Oracle, logprobs: int | None) -> None:
    """As on a CPU, in graphs and beside them, overlapped and preempted."""
    expected = changed(oracle, logprobs, attention="torch", device="cpu")
    for options in (
        {"overlap": False, "enforce_eager": True}, {"overlap": False}, {"overlap": True},
        {"overlap": True, "num_kv_blocks": 12, "max_num_batched_tokens": 48},
    ):  # fmt: skip
        for output, other in zip(changed(oracle, logprobs, **options), expected, strict=True):
            assert output["token_ids"] == other["token_ids"], options
            entries = [*(output.prompt_logprobs or [None])[1:], *(output.outputs[0].logprobs or ())]
            others = [*(other.prompt_logprobs or [None])[1:], *(other.outputs[0].logprobs or ())]
            for entry, expected_entry in zip(entries, others, strict=True):
                for token_id, value in expected_entry.items():
                    assert entry[token_id].logprob == pytest.approx(value.logprob, abs=1e-3)
                    assert entry[token_id].decoded_token == value.decoded_token


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_scores(oracle: Oracle, enforce_eager: bool) -> None:
    """As on a CPU, of continuations of one token, which are scored in graphs, and of several; also from the cache."""
    reference = oracle("bard")
    contexts = [prompt for prompt in reference.prompts for _ in range(2)]
    continuations = [output[:count] for output in reference.outputs for count in (1, 5)]
    continuations += [[token_id ^ 1 for token_id in continuation] for continuation in continuations]
    expected = start(oracle, "torch", dtype="float32", device="cpu").score(contexts * 2, continuations, use_tqdm=False)
    assert {score.is_greedy for score in expected} == {True, False}
    llm = start(oracle, "triton", dtype="float32", max_num_seqs=8, enforce_eager=enforce_eager)
    for _ in range(2):
        for score, other in zip(llm.score(contexts * 2, continuations, use_tqdm=False), expected, strict=True):
            assert score.logprobs == pytest.approx(other.logprobs, abs=1e-3)
            assert score.is_greedy == other.is_greedy


@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_what_bfloat16_generates_is_greedy(oracle: Oracle, attention: str) -> None:
    """Also where tokens are equally likely; but for the last bits of what was computed in a batch of other sizes."""
    reference = oracle("bard")
    llm = start(oracle, attention, dtype="bfloat16")
    outputs = llm.generate(reference.prompts, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    scores = llm.score(reference.prompts, [output["token_ids"] for output in outputs], use_tqdm=False)
    assert sum(score.is_greedy for score in scores) >= 0.9 * len(scores)
