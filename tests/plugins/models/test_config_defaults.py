"""What a key of config.json means that is missing, null or half switched on: what it means to transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.contracts.model import ModelContext
from nanoflow.core.layers.decoder_config import completed
from nanoflow.core.loading.hf_config import HFConfig
from nanoflow.core.registry.registry import Registry
from nanoflow.plugins.models.llama import Llama
from nanoflow.plugins.models.mistral import Mistral
from nanoflow.plugins.models.qwen2 import Qwen2
from nanoflow.plugins.models.qwen3 import Qwen3
from nanoflow.plugins.models.qwen3_moe import Qwen3MoE

MODELS = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3, "qwen3_moe": Qwen3MoE}
TINY = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 32,
        "head_dim": 2, "max_position_embeddings": 8192, "num_experts": 2, "num_experts_per_tok": 1}  # fmt: skip
GONE = "gone"
REGISTRY = Registry.load(extra=[])
FULL, SLIDING = "full_attention", "sliding_attention"


def windows(model_type: str, values: dict[str, Any]) -> tuple[int | None, ...]:
    """A model's, at 8,192 tokens."""
    hf_config = HFConfig({**TINY, "num_key_value_heads": 1, **values})
    architecture = MODELS[model_type].__doc__.split(".")[0]
    entry, options = REGISTRY.model_for(PluginChoice(model_type), [architecture])
    return entry.component.build(options, ModelContext(hf_config, torch.float32, torch.device("meta"), 8192)).windows


def windows_of_transformers(model_type: str, values: dict[str, Any]) -> tuple[int | None, ...]:
    config = AutoConfig.for_model(model_type, **{**TINY, "num_key_value_heads": 1, **values})
    window = getattr(config, "sliding_window", None)
    by_layer = model_type in ("qwen2", "qwen3")
    types = config.layer_types if by_layer else [SLIDING] * 2
    if by_layer and SLIDING in types and window is None:
        raise ValueError("a mask without a window")
    return tuple(window if name == SLIDING else None for name in types)


@pytest.mark.parametrize("model_type", [model_type for model_type in MODELS if model_type != "llama"])
def test_windows(model_type: str) -> None:
    keys = {
        "use_sliding_window": (GONE, False, True),
        "sliding_window": (GONE, None, 7),
        "max_window_layers": (GONE, 0, 1),
        "layer_types": (GONE, None, [FULL, SLIDING], ["attention", FULL]),
    }
    for choice in itertools.product(*keys.values()):
        values = {key: value for key, value in zip(keys, choice, strict=True) if value != GONE}
        try:
            expected = windows_of_transformers(model_type, values)
        except ValueError:
            with pytest.raises(CheckpointError, match="sliding_attention in layer_types"):
                windows(model_type, values)
        else:
            assert windows(model_type, values) == expected, values


@pytest.mark.parametrize("model_type", MODELS)
def test_values_of_missing_keys(model_type: str) -> None:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {"hidden_size": 4096, "num_attention_heads": 32}
    ours = completed(given, MODELS[model_type].defaults)
    theirs = AutoConfig.for_model(model_type, **given)
    for key, value in ours.items():
        if key not in needed and not (key == "sliding_window" and not ours.get("use_sliding_window", True)):
            expected = getattr(theirs, key, 4096 // 32 if key == "head_dim" else None)
            assert value == expected, f"{key}: {value}, {expected}"
