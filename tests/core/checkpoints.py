"""Small random Qwen3 checkpoints, and what transformers generates with them."""

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
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hf_config = Qwen3Config(**{
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    } | config)  # fmt: skip
    model = Qwen3ForCausalLM(hf_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((2.0 if "q_norm" in name else 1.0) + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)  # small, so that what the layers add decides
            else:
                parameter.copy_(2.0 * noise / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if old_rope is not None:
        edit_json(folder / "config.json", lambda c: c.pop("rope_parameters") and c.update(old_rope))
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
