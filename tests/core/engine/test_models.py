"""Greedy tokens of every model in float32 are those of transformers; `test_oracle.py` tries more with Qwen3."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from nanoflow import LLM
from tests.core.checkpoints import OTHERS, Oracle
from tests.core.running import check, is_mixed, recorded


def start(oracle: Oracle, name: str, **options: Any) -> LLM:
    return LLM(str(oracle(name).folder), **{"dtype": "float32", "device": "cpu", "num_kv_blocks": 512} | options)


@pytest.mark.parametrize("name", OTHERS)
def test_chunks_and_prefixes(oracle: Oracle, name: str) -> None:
    """Chunked prefill beside decodes, and blocks found in the prefix cache."""
    llm = start(oracle, name, block_size=8, max_num_seqs=8, max_num_batched_tokens=24)
    assert name.startswith(llm.describe()["model"])
    for _ in range(2):
        with recorded(llm) as batches:
            check(llm, oracle(name))
        assert any(map(is_mixed, batches))
    assert llm.stats.num_hit_tokens > 0
    if "max_shard_size" in OTHERS[name]:
        assert len(list(oracle(name).folder.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_preemption(oracle: Oracle, name: str, overlap: bool) -> None:
    llm = start(oracle, name, block_size=4, num_kv_blocks=21, max_num_seqs=6, overlap=overlap)
    check(llm, oracle(name))
    assert llm.stats.num_preemptions > 0


@pytest.mark.slow
def test_the_checkpoints_differ(oracle: Oracle) -> None:
    """A spec that was not heeded would give the tokens of another."""
    for one, other in combinations(OTHERS, 2):
        if OTHERS[one]["model_type"] == OTHERS[other]["model_type"]:
            assert oracle(one).outputs[2:] != oracle(other).outputs[2:], (one, other)
