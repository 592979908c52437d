"""Every model gives the logits of one rank on several, with nothing but the layers that it is made of.

Ranks are threads here, which start at once; `test_tensor_parallel` has processes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.data.attention_input import AttentionInput
from nanoflow.core.data.parallel import ParallelContext, Shard
from nanoflow.core.loading import read_config, safetensors
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.ranks import on_ranks
from tests.core.checkpoints import OTHERS, SPECS, Oracle

REGISTRY = Registry.load()
CPU = torch.device("cpu")
LENGTH = 20  # one block, one prompt


def logits(folder: Path, size: int, token_ids: torch.Tensor, *, in_norm: bool = False) -> list[torch.Tensor]:
    """Of each token of one prompt, [T, V], on each rank; `in_norm` as in `on_ranks`."""
    hf_config = read_config(folder)
    entry, options = REGISTRY.model_for(PluginChoice("auto"), hf_config["architectures"])
    positions = torch.arange(LENGTH)
    inputs = AttentionInput(
        slot_mapping_T=positions, query_start_S1=torch.tensor([0, LENGTH], dtype=torch.int32),
        context_lens_S=torch.tensor([LENGTH], dtype=torch.int32), block_tables_SB=torch.zeros(1, 1, dtype=torch.int32),
        query_lens=np.array([LENGTH]), context_lens=np.array([LENGTH]), num_decodes=0,
    )  # fmt: skip

    def work(parallel: ParallelContext) -> torch.Tensor:
        model = entry.component.build(options, ModelContext(hf_config, torch.float32, CPU, LENGTH, parallel))
        targets = model.weights()
        assert size == 1 or any(isinstance(target, Shard) for target in targets.values())
        safetensors.load_weights(folder, targets)
        context = AttentionContext(
            model.num_layers, parallel.share(model.num_heads, "").length,
            parallel.share_kv_heads(model.num_kv_heads).length, model.head_dim, model.scale, LENGTH, torch.float32, CPU,
            model.windows,
        )  # fmt: skip
        backend, backend_options = REGISTRY.resolve("attention", PluginChoice("torch"), context)
        attention = backend.component.build(backend_options, context)
        attention.allocate(1)
        attention.plan(inputs)
        return parallel.all_gather(model.compute_logits(model.forward(token_ids, positions, attention)))

    return on_ranks(size, work, in_norm=in_norm)


@pytest.mark.parametrize("in_norm", [False, True])
@pytest.mark.parametrize("name", SPECS | OTHERS)
def test_logits(name: str, in_norm: bool, oracle: Oracle) -> None:
    folder = oracle(name).folder
    token_ids = torch.randint(128, (LENGTH,), generator=torch.Generator().manual_seed(0))
    (expected,) = logits(folder, 1, token_ids)
    for size in (2, 4):
        for result in logits(folder, size, token_ids, in_norm=in_norm):
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
