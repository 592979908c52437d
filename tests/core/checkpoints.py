"""Small random Qwen3 checkpoints, and what transformers generates with them."""

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

# name -> arguments of `make_qwen3`. "plain" is the one that the engine's variations are tried on.
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


class Oracle:
    """Checkpoints and references by name, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[str, Reference] = {}

    def __call__(self, name: str) -> Reference:
        """The reference of one of `SPECS`, or of the bundled checkpoint, `bard`."""
        if name not in self.references:
            if name == "bard":
                import nanoflow

                folder = Path(nanoflow.__file__).parent / "assets" / "bard"
            else:
                folder = make_qwen3(self.folder / name, **SPECS[name])
            self.references[name] = make_reference(folder, prompt_plan(full=name == "plain"))
        return self.references[name]


def make_qwen3(
    folder: Path, *, seed: int = 0, max_shard_size: str = "1GB", old_rope: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Write a random checkpoint whose every parameter matters for its output.

    Args:
        folder: where to; made if need be.
        seed: of its weights.
        max_shard_size: most bytes in a file.
        old_rope: keys to put into config.json in place of `rope_parameters`, as transformers 4 wrote them.
        config: in place of the defaults below.
    """
    hf_config = {
        "model_type": "qwen3", "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": False,
    }  # fmt: skip
    make_checkpoint(folder, hf_config | config, seed=seed, max_shard_size=max_shard_size)
    if old_rope is not None:
        edit_json(folder / "config.json", lambda c: c.pop("rope_parameters") and c.update(old_rope))
    return folder


def prompt_plan(full: bool) -> tuple[tuple[int, int], ...]:
    """(tokens shared with the other prompts, tokens in all): blocks of 4 and 16 less one, whole, and plus one."""
    if not full:
        return PLAN
    unshared = ((0, n) for n in (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 80))
    return (*unshared, *((32, n) for n in (33, 34, 40)), *((48, n) for n in (49, 64)))
