"""Greedy tokens of every model in float32 are those of transformers; `test_oracle.py` tries more with Qwen3."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import LLM
from nanoflow.core.build import HFConfig
from nanoflow.core.checkpoint import load_weights, read_config
from nanoflow.core.config import PluginChoice
from nanoflow.core.interfaces import AttentionContext, ModelContext, NoOptions
from nanoflow.core.parallel import ParallelContext
from nanoflow.core.registry import Registry
from nanoflow.plugins.attention.torch_paged import TorchAttention
from nanoflow.testing.batches import Case
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import MAX_MODEL_LEN, OTHERS, Oracle
from tests.core.running import check, is_mixed, recorded

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("name", OTHERS)
def test_split_over_ranks(oracle: Oracle, name: str) -> None:
    """Each of two ranks has the logits of one that has all."""
    folder, prompt = oracle(name).folder, oracle(name).prompts[2]
    hf_config = HFConfig(read_config(folder))
    entry, options = Registry.load(extra=[]).model_for(PluginChoice("auto"), hf_config["architectures"])
    num_blocks = -(-len(prompt) // 16)
    case = Case(np.array([len(prompt)]), np.array([len(prompt)]), np.arange(num_blocks)[None], num_blocks)

    def logits(parallel: ParallelContext) -> torch.Tensor:
        model = entry.component.build(options, ModelContext(hf_config, torch.float32, CPU, MAX_MODEL_LEN, parallel))
        load_weights(folder, model.weights())
        context = AttentionContext(
            num_layers=model.num_layers, num_heads=parallel.share(model.num_heads, "").length,
            num_kv_heads=parallel.share_kv_heads(model.num_kv_heads).length, head_dim=model.head_dim,
            scale=model.scale, windows=model.windows, block_size=16, dtype=torch.float32, device=CPU,
        )  # fmt: skip
        attention = TorchAttention(NoOptions(), context)
        attention.allocate(num_blocks)
        attention.plan(case.inputs(16))
        return model.compute_logits(model.forward(torch.tensor(prompt), torch.arange(len(prompt)), attention))

    (whole,) = on_ranks(1, logits)
    for part in on_ranks(2, logits):
        assert (part - whole).norm() / whole.norm() < 1e-5


def test_the_checkpoints_differ(oracle: Oracle) -> None:
    """A spec that was not heeded would give the tokens of another."""
    for one, other in combinations(OTHERS, 2):
        if OTHERS[one]["model_type"] == OTHERS[other]["model_type"]:
            assert oracle(one).outputs[2:] != oracle(other).outputs[2:], (one, other)
