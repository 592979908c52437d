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


class TestQwen2(ModelArchSuite):
    component = "qwen2"
    hf_configs = {"plain": TINY | {"model_type": "qwen2"}}


class TestQwen3MoE(ModelArchSuite):
    component = "qwen3_moe"
    hf_configs = {
        "sparse": TINY | {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    }  # fmt: skip


class TestLlama(ModelArchSuite):
    component = "llama"
    hf_configs = {"biased": TINY | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}}


class TestMistral(ModelArchSuite):
    component = "mistral"
    hf_configs = {"window": TINY | {"model_type": "mistral", "sliding_window": 19}}
