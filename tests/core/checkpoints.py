"""Small random checkpoints, and what transformers generates with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoflow.testing.checkpoints import PLAN, Reference, edit_json, make_checkpoint, make_reference

VOCAB_SIZE = 128
MAX_MODEL_LEN = 256

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 20}
MOE = {"model_type": "qwen3_moe", "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

# name -> arguments of `make_tiny`, of Qwen3. "plain" is the one that the engine's variations are tried on.
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "gqa1": {"num_key_value_heads": 4},
    "gqa4": {"num_key_value_heads": 1},
    "wide_heads": {"hidden_size": 40, "head_dim": 32},
    "narrow_heads": {"head_dim": 8, "num_hidden_layers": 3},
    "sharded": {"max_shard_size": "20KB"},
    "sharded_tied": {"max_shard_size": "20KB", "tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": LINEAR | {"rope_theta": 1000.0}},
    "yarn": {"rope_parameters": YARN | {"rope_theta": 1000.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    "old_theta": {"old_rope": {"rope_theta": 500.0, "rope_scaling": None}},
    "old_linear": {"old_rope": {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}},
    "old_yarn": {"old_rope": {"rope_theta": 1000.0, "rope_scaling": YARN}},
}
# The same of other models. All of one model differ from each other.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2_yarn": {"model_type": "qwen2", "num_key_value_heads": 1, "rope_parameters": YARN | {"rope_theta": 1000.0}},
    "qwen2_sharded": {"model_type": "qwen2", "max_shard_size": "20KB", "hidden_size": 40, "rms_norm_eps": 1e-5},
    "qwen2_windows": {"model_type": "qwen2", "num_hidden_layers": 3, "max_window_layers": 1} | WINDOW,
    "qwen3_windows": {"model_type": "qwen3", "num_hidden_layers": 3, "max_window_layers": 2} | WINDOW,
    "qwen3_types": {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]} | WINDOW,
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": 13},
    "mistral_narrow": {"model_type": "mistral", "sliding_window": 2, "num_key_value_heads": 1},
    "mistral_wide": {"model_type": "mistral", "sliding_window": 48, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": MOE,
    "qwen3_moe_renormalized": MOE | {"norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_moe_sparse": MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "qwen3_moe_dense_first": MOE | {"mlp_only_layers": [0], "attention_bias": True},
    "qwen3_moe_one_of_two": MOE | {"num_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe_all": MOE | {"num_experts_per_tok": 7, "num_key_value_heads": 1},
    "qwen3_moe_windows": MOE | {"max_shard_size": "50KB"} | WINDOW,
    "qwen3_moe_of_the_hub": MOE | {"seed": 1, "rename": {"num_local_experts": "num_experts"}},
    "llama": {"model_type": "llama"},
    "llama_3": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "llama_wide_heads": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": None},
    "llama_linear": {"model_type": "llama", "rope_parameters": LINEAR | {"rope_theta": 1000.0}},
    "llama_dynamic": {"model_type": "llama", "rope_parameters": DYNAMIC | {"rope_theta": 500.0}},
    "llama_old": {"model_type": "llama", "seed": 1, "old_rope": {"rope_theta": 500.0, "rope_scaling": None}},
}


class Oracle:
    """Checkpoints and references by name, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[str, Reference] = {}

    def __call__(self, name: str) -> Reference:
        """The reference of one of `SPECS` or `OTHERS`, or of the bundled checkpoint, `bard`."""
        if name not in self.references:
            if name == "bard":
                import nanoflow

                folder = Path(nanoflow.__file__).parent / "assets" / "bard"
            else:
                folder = make_tiny(self.folder / name, **(SPECS | OTHERS)[name])
            self.references[name] = make_reference(folder, prompt_plan(full=name == "plain"))
        return self.references[name]


def make_tiny(
    folder: Path, *, model_type: str = "qwen3", seed: int = 0, max_shard_size: str = "1GB",
    old_rope: dict[str, Any] | None = None, rename: dict[str, str] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """Write a random checkpoint whose every parameter matters for its output.

    Args:
        folder: where to; made if need be.
        model_type: as transformers names it.
        seed: of its weights.
        max_shard_size: most bytes in a file.
        old_rope: keys to put into config.json in place of `rope_parameters`, as transformers 4 wrote them.
        rename: other names for keys of config.json.
        config: in place of the defaults below.
    """
    hf_config = {
        "model_type": model_type, "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": False,
    }  # fmt: skip
    if model_type.startswith("qwen3"):
        hf_config["head_dim"] = 16
    make_checkpoint(folder, hf_config | config, seed=seed, max_shard_size=max_shard_size)
    if old_rope is not None:
        edit_json(folder / "config.json", lambda c: c.pop("rope_parameters") and c.update(old_rope))
    for old, new in (rename or {}).items():
        edit_json(folder / "config.json", lambda c, old=old, new=new: c.update({new: c.pop(old)}))
    return folder


def prompt_plan(full: bool) -> tuple[tuple[int, int], ...]:
    """(tokens shared with the other prompts, tokens in all): blocks of 4 and 16 less one, whole, and plus one."""
    if not full:
        return PLAN
    unshared = ((0, n) for n in (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 80))
    return (*unshared, *((32, n) for n in (33, 34, 40)), *((48, n) for n in (49, 64)))
