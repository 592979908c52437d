"""Small random checkpoints, and what transformers generates with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 128
MAX_MODEL_LEN = 256
NUM_OUTPUT_TOKENS = 20
# A reference is kept only if each of its tokens leads by so many standard deviations of its logits: far above the
# rounding of float32, so that no order of summation can change a token.
CLEAR_LEAD = 3e-4

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}

WINDOW = {"use_sliding_window": True, "sliding_window": 20}

EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

# name -> arguments of `make_checkpoint`, of Qwen3. "plain" is the one that the engine's variations are tried on.
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
    "qwen2": {"model": "Qwen2"},
    "qwen2_tied": {"model": "Qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2_yarn": {"model": "Qwen2", "num_key_value_heads": 1, "rope_parameters": YARN | {"rope_theta": 1000.0}},
    "qwen2_sharded": {"model": "Qwen2", "max_shard_size": "20KB", "hidden_size": 40, "rms_norm_eps": 1e-5},
    "qwen2_windows": {"model": "Qwen2", "num_hidden_layers": 3, "max_window_layers": 1} | WINDOW,
    "qwen3_windows": {"model": "Qwen3", "num_hidden_layers": 3, "max_window_layers": 2} | WINDOW,
    "qwen3_types": {"model": "Qwen3", "layer_types": ["sliding_attention", "full_attention"]} | WINDOW,
    "mistral": {"model": "Mistral", "sliding_window": None},
    "mistral_window": {"model": "Mistral", "sliding_window": 13},
    "mistral_narrow": {"model": "Mistral", "sliding_window": 2, "num_key_value_heads": 1},
    "mistral_wide": {"model": "Mistral", "sliding_window": 48, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"model": "Qwen3Moe"} | EXPERTS,
    "qwen3_moe_renormalized": {"model": "Qwen3Moe", "norm_topk_prob": True, "tie_word_embeddings": True} | EXPERTS,
    "qwen3_moe_sparse": {"model": "Qwen3Moe", "num_hidden_layers": 4, "decoder_sparse_step": 2} | EXPERTS,
    "qwen3_moe_dense_first": {"model": "Qwen3Moe", "mlp_only_layers": [0], "attention_bias": True} | EXPERTS,
    "qwen3_moe_one_of_two": {"model": "Qwen3Moe"} | EXPERTS | {"num_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe_all": {"model": "Qwen3Moe"} | EXPERTS | {"num_experts_per_tok": 7, "num_key_value_heads": 1},
    "qwen3_moe_windows": {"model": "Qwen3Moe", "max_shard_size": "50KB"} | EXPERTS | WINDOW,
    "qwen3_moe_of_the_hub": {"model": "Qwen3Moe", "seed": 1, "rename": {"num_local_experts": "num_experts"}} | EXPERTS,
    "llama": {"model": "Llama"},
    "llama_3": {"model": "Llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    "llama_biased": {"model": "Llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "llama_wide_heads": {"model": "Llama", "head_dim": 32, "num_key_value_heads": None},
    "llama_linear": {"model": "Llama", "rope_parameters": LINEAR | {"rope_theta": 1000.0}},
    "llama_dynamic": {"model": "Llama", "rope_parameters": DYNAMIC | {"rope_theta": 500.0}},
    "llama_old": {"model": "Llama", "seed": 1, "old_rope": {"rope_theta": 500.0, "rope_scaling": None}},
}


@dataclass
class Reference:
    """A checkpoint, prompts, and the tokens that transformers generates after each of them."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]] = field(default_factory=list)


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
                folder = make_checkpoint(self.folder / name, **(SPECS | OTHERS)[name])
            self.references[name] = make_reference(folder, prompt_plan(full=name == "plain"))
        return self.references[name]


def make_checkpoint(
    folder: Path, *, model: str = "Qwen3", seed: int = 0, max_shard_size: str = "1GB",
    old_rope: dict[str, Any] | None = None,
    rename: dict[str, str] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """Write a random checkpoint whose every parameter matters for its output.

    Args:
        folder: where to; made if need be.
        model: how its classes in transformers begin.
        seed: of its weights.
        max_shard_size: most bytes in a file.
        old_rope: keys to put into config.json in place of `rope_parameters`, as transformers 4 wrote them.
        rename: other names for keys of config.json.
        config: in place of the defaults below.
    """
    import transformers

    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2} | ({"head_dim": 16} if model.startswith("Qwen3") else {})  # fmt: skip
    hf_config = getattr(transformers, f"{model}Config")(**{
        "vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    } | sizes | config)  # fmt: skip
    network = getattr(transformers, f"{model}ForCausalLM")(hf_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((2.0 if "q_norm" in name else 1.0) + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)  # small, so that what the layers add decides
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)
    network.save_pretrained(folder, max_shard_size=max_shard_size)
    if old_rope is not None:
        edit_json(folder / "config.json", lambda c: c.pop("rope_parameters") and c.update(old_rope))
    for old, new in (rename or {}).items():
        edit_json(folder / "config.json", lambda c, old=old, new=new: c.update({new: c.pop(old)}))
    return folder


def edit_json(file: Path, change: Any) -> None:
    """Apply `change` to the object in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def prompt_plan(full: bool) -> list[tuple[int, int]]:
    """(tokens shared with the other prompts, tokens in all): blocks of 4 and 16 less one, whole, and plus one."""
    if not full:
        return [(0, 1), (0, 17), (0, 64), (33, 40), (33, 47)]
    unshared = [(0, n) for n in (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 80)]
    return unshared + [(32, n) for n in (33, 34, 40)] + [(48, n) for n in (49, 64)]


def make_reference(folder: Path, plan: list[tuple[int, int]], seed: int = 1) -> Reference:
    """Prompts by `plan`, each drawn until transformers' answer to it is clear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, model.config.vocab_size, (count,), generator=generator).tolist()

    common = draw(max(shared for shared, _ in plan))
    reference = Reference(folder, [])
    for shared, length in plan:
        for _ in range(100):
            prompt = common[:shared] + draw(length - shared)
            output, lead = generate(model, prompt)
            if lead > CLEAR_LEAD:
                break
        else:
            raise AssertionError("transformers' answers are all close calls: this checkpoint is no good for a test")
        reference.prompts.append(prompt)
        reference.outputs.append(output)
    return reference


def generate(
    model: Any, prompt: list[int], num_tokens: int = NUM_OUTPUT_TOKENS, **options: Any
) -> tuple[list[int], float]:
    """transformers' greedy tokens, and the least lead that one of them had, in standard deviations of its logits."""
    options = {"eos_token_id": None, "pad_token_id": 0} | options
    result = model.generate(
        torch.tensor([prompt], device=model.device), attention_mask=torch.ones(1, len(prompt), device=model.device),
        do_sample=False, max_new_tokens=num_tokens, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    logits = torch.cat(result.logits).float()
    best = logits.topk(2).values
    lead = ((best[:, 0] - best[:, 1]) / logits.std(-1)).min().item()
    return result.sequences[0, len(prompt) :].tolist(), lead
