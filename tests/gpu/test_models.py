"""Models on a GPU: float32 greedy tokens are those of transformers, bfloat16 logits are as near as its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from nanoflow import LLM
from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.loading.hf_config import read_config
from nanoflow.core.loading.safetensors import load_weights
from nanoflow.core.registry.component import NoOptions
from nanoflow.core.registry.registry import Registry
from nanoflow.plugins.attention.triton.backend import TritonAttention
from nanoflow.testing.batches import Case
from tests.core.checkpoints import MAX_MODEL_LEN, OTHERS, Oracle
from tests.core.running import check, engine_of

DEVICE = torch.device("cuda")


def start(oracle: Oracle, name: str, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cuda", "num_kv_blocks": 512, "max_num_seqs": 8}
    return LLM(str(oracle(name).folder), **{**defaults, **options})


@pytest.mark.parametrize("name", OTHERS)
def test_kernel_by_kernel(oracle: Oracle, name: str) -> None:
    llm = start(oracle, name, attention="torch", block_size=4, max_num_batched_tokens=24)
    for _ in range(2):  # the second time from the prefix cache
        check(llm, oracle(name))
    assert llm.stats.num_hit_tokens > 0


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_triton(oracle: Oracle, name: str, enforce_eager: bool) -> None:
    """In graphs and without, and under preemption: five requests in blocks for one and a half."""
    llm = start(oracle, name, attention="triton", block_size=16, max_num_batched_tokens=48, num_kv_blocks=9,
                enforce_eager=enforce_eager)  # fmt: skip
    assert (engine_of(llm).executor.runner.graphs is None) == enforce_eager
    for _ in range(2):
        check(llm, oracle(name))
    assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("name", ["qwen2", "qwen2_windows", "llama_3", "mistral_window", "qwen3_windows"])
def test_bfloat16_is_as_near_to_float32_as_transformers(oracle: Oracle, name: str) -> None:
    """Logits after each token of one prompt. Not of experts, where rounding may choose another one."""
    from transformers import AutoModelForCausalLM

    folder = oracle(name).folder
    prompt = torch.tensor([token for prompt in oracle(name).prompts for token in prompt], device="cuda")
    with torch.inference_mode():
        exact, half = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda()(prompt[None]).logits[0].double()
            for dtype in (torch.float32, torch.bfloat16)
        )
        hf_config = read_config(folder)
        entry, options = Registry.load(extra=[]).model_for(PluginChoice("auto"), hf_config["architectures"])
        model = entry.component.build(
            options, ModelContext(hf_config, torch.bfloat16, DEVICE, MAX_MODEL_LEN, ops=select_ops(DEVICE))
        )
        load_weights(folder, model.weights())
        context = AttentionContext(
            num_layers=model.num_layers, num_heads=model.num_heads, num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, scale=model.scale, windows=model.windows, block_size=16, dtype=torch.bfloat16,
            device=DEVICE,
        )  # fmt: skip
        length, num_blocks = len(prompt), -(-len(prompt) // 16)
        case = Case(np.array([length]), np.array([length]), np.arange(num_blocks, dtype=np.int32)[None], num_blocks)
        attention = TritonAttention(NoOptions(), context)
        attention.allocate(num_blocks)
        attention.plan(case.inputs(16, DEVICE))
        hidden = model.forward(prompt, torch.arange(length, device="cuda"), attention)
        ours = model.compute_logits(hidden).double()

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    print(f"{name}: ours {error(ours):.4f}, transformers {error(half):.4f}")
    assert error(ours) < 1.3 * error(half)
