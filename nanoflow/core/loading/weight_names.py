"""Which tensor of a checkpoint goes where: by names as transformers saves them, and as other savers change them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nanoflow.core.config.errors import CheckpointError

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")  # how names of a token embedding end

# What torch.compile, FSDP, activation checkpointing, DDP, peft and multimodal models put before or into names.
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "base_model.model.", "language_model.")

# Tensors that follow from the config, or that generating text has no use for.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|position_ids|_extra_state)$")
OTHER_TASKS = re.compile(r"^(v_head|value_head|score|classifier|mtp)\.")

ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.|$)")
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight_scale(_inv)?|input_scale|weight_packed|weight_shape|weight_zero_point"
    r"|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\S*|weight_format|codebooks|codes)$"
)


def match(names: Iterable[str], targets: Mapping[str, Any], place: str) -> tuple[dict[str, str], list[str]]:
    """Where the tensors of a checkpoint go.

    Args:
        names: of the checkpoint's tensors.
        targets: as from `ModelArch.weights`.
        place: where the checkpoint lies, for errors.

    Returns:
        The target of each name that has one; and names without one, of which `is_needless` says that they may be passed
        over, or which end in `.bias` and may be so if they are all zeros.

    Raises:
        CheckpointError: a tensor that the model has no place for, or two tensors with one target.
    """
    ((prefix, _),) = Counter(name.partition(".")[0] for name in targets).most_common(1) or [("", 0)]
    found: dict[str, str] = {}
    left_over: list[str] = []
    for name in names:
        target = _target(name, targets, prefix)
        if target is not None:
            found[name] = target
        elif is_needless(name) or name.endswith(".bias"):
            left_over.append(name)
        else:
            raise CheckpointError(_why_unknown(name, place))
    taken: dict[str, str] = {}
    for name, target in found.items():
        if (other := taken.setdefault(target, name)) != name:
            raise CheckpointError(
                f"{place} holds both {other!r:.90} and {name!r:.90}, which are one tensor of the model."
            )
    _take_embedding_from_head(found, taken, targets)
    return found, left_over


def is_needless(name: str) -> bool:
    """Whether a tensor without a target may be passed over: it changes no token."""
    *_, name = _unwrapped(name)
    return bool(BUFFERS.search(name) or OTHER_TASKS.search(name))


def no_place(name: str, place: str) -> CheckpointError:
    """The error about a tensor that the model has no place for."""
    return CheckpointError(f"{place} holds {name!r:.120}, which the model has no place for.")


def _target(name: str, targets: Mapping[str, Any], prefix: str) -> str | None:
    """The target of a name. Those of a base model's checkpoint lack its prefix, such as `model.`; others have two."""
    for plain in _unwrapped(name):
        for candidate in (plain, f"{prefix}.{plain}", plain.removeprefix(f"{prefix}.")):
            if candidate in targets:
                return candidate
    return None


def _unwrapped(name: str) -> Iterator[str]:
    """The name without what wrappers put into it, then without one prefix after the other."""
    name = WRAPPERS.sub(r"\1", name)
    yield name
    while start := next((start for start in PREFIXES if name.startswith(start)), None):
        name = name[len(start) :]
        yield name


def _take_embedding_from_head(found: dict[str, str], taken: dict[str, str], targets: Mapping[str, Any]) -> None:
    """A head that shares the embedding's table may be what it is stored as."""
    if HEAD not in taken or targets[HEAD] is not None:
        return
    for name, target in targets.items():
        if name.endswith(EMBEDDINGS) and target is not None and name not in taken:
            found[taken[HEAD]] = name


def _why_unknown(name: str, place: str) -> str:
    if QUANTIZED.search(name):
        return (
            f"{place} holds {name!r:.120}, which is part of quantized weights, and these are not served; use the "
            "original checkpoint, in bfloat16 or float16."
        )
    if ADAPTER.search(name):
        return (
            f"{place} holds {name!r:.120}, which is part of an adapter (LoRA); merge it into the model with peft's "
            "merge_and_unload() and save_pretrained()."
        )
    return str(no_place(name, place))
