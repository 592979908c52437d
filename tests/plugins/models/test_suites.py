"""The built-in models run the kit's suite."""

from __future__ import annotations

from nanoflow.testing import ModelArchSuite

TINY = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


class TestQwen3(ModelArchSuite):
    component = "qwen3"
    hf_configs = {
        "plain": TINY | {"model_type": "qwen3", "head_dim": 16},
        "tied": TINY | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "attention_bias": True},
    }
