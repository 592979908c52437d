"""Small random checkpoints, and what transformers says to them: the oracle for models and for the whole engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

NUM_OUTPUT_TOKENS = 20
# A reference is kept only if each of its tokens leads by so many standard deviations of its logits: far above the
# rounding of float32, so that no order of summation can change a token.
CLEAR_LEAD = 3e-4
# (tokens shared with the other prompts, tokens in all)
PLAN = ((0, 1), (0, 17), (0, 64), (33, 40), (33, 47))
ANY_LENGTH = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass
class Reference:
    """A checkpoint, prompts, and the tokens that transformers generates after each of them."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]] = field(default_factory=list)


def make_checkpoint(
    folder: Path, hf_config: Mapping[str, Any], *, seed: int = 0, max_shard_size: str = "1GB"
) -> Path:  # fmt: skip
    """Write a random checkpoint whose every parameter matters for its output.

    Args:
        folder: where to; made if need be.
        hf_config: `model_type`, and what differs from that model's defaults in transformers.
        seed: of its weights.
        max_shard_size: most bytes in a file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = ANY_LENGTH | dict(hf_config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(network, seed)
    network.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def randomize(network: nn.Module, seed: int) -> None:
    """Random weights with which attention is sharp and each layer has a say, whatever the model."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:  # of a norm
                parameter.copy_((2.0 if "q_norm" in name else 1.0) + 0.2 * noise)
            elif id(parameter) in embeddings:
                parameter.copy_(0.3 * noise)  # small, so that what the layers add decides
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Apply `change` to the object in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def oracle_of(folder: Path) -> Any:
    """The checkpoint as transformers' model, in float32 with attention written out."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def make_reference(folder: Path, plan: tuple[tuple[int, int], ...] = PLAN, seed: int = 1) -> Reference:
    """Prompts by `plan`, each drawn until transformers' answer to it is clear."""
    model = oracle_of(folder)
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
