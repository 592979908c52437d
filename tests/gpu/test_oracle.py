"""On a GPU, too, greedy tokens in float32 are exactly those of transformers (which ran on the CPU)."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of, is_mixed, recorded, tokens

BLOCK_SIZE = 4
FEWEST_BLOCKS = 25  # what the longest request needs


def start(oracle: Oracle, name: str = "plain", **options: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "device": "cuda",
        "attention": "torch",
        "num_kv_blocks": 512,
        "block_size": BLOCK_SIZE,
    }
    return LLM(str(oracle(name).folder), **{**defaults, **options})


@pytest.mark.parametrize("name", ["plain", "gqa4", "sharded_tied", "wide_heads", "yarn", "bard"])
def test_checkpoints(oracle: Oracle, name: str) -> None:
    llm = start(oracle, name, max_num_seqs=8, max_num_batched_tokens=24)
    with recorded(llm) as batches:
        check(llm, oracle(name))
    assert any(map(is_mixed, batches))
    assert llm.stats.num_hit_tokens > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block_manager", ["plain", "prefix"])
@pytest.mark.parametrize("budget", [20, 2048])
def test_forced_preemption(oracle: Oracle, budget: int, block_manager: str, overlap: bool) -> None:
    llm = start(oracle, overlap=overlap, block_manager=block_manager, num_kv_blocks=FEWEST_BLOCKS, max_num_seqs=6,
                max_num_batched_tokens=budget)  # fmt: skip
    check(llm, oracle("plain"))
    assert llm.stats.num_preemptions > 0


def test_overlap_is_on_by_default(oracle: Oracle) -> None:
    llm = start(oracle)
    assert engine_of(llm).depth == 1
    for _ in range(2):
        check(llm, oracle("plain"))


def test_same_seed_draws_the_same_tokens(oracle: Oracle) -> None:
    params = [SamplingParams(max_tokens=20, ignore_eos=True, seed=100 + i, top_p=0.9) for i in range(12)]
    prompts = oracle("plain").prompts[:12]

    def draw(**options: Any) -> list[list[int]]:
        return tokens(start(oracle, **options).generate(prompts, params, use_tqdm=False))

    expected = draw()
    assert draw(overlap=False, max_num_seqs=3, max_num_batched_tokens=7) == expected
    assert draw(num_kv_blocks=FEWEST_BLOCKS) == expected
    assert draw(device="cpu") == expected
