"""What a decoder reads in config.json: defaults for what is left out, and one sentence for a value that can't be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.core.config.errors import CheckpointError, shown
from nanoflow.core.config.fields import is_int, is_number

KEEPS_NULL = ("sliding_window",)  # where null means none

# The least and the most that an integer may be. The most are far above any model's, and keep time and memory bounded.
INTEGERS: Mapping[str, tuple[int, int]] = {
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "moe_intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**12),
    "vocab_size": (1, 2**24),
    "sliding_window": (1, 2**53),
    "max_window_layers": (0, 2**53),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "num_experts_per_tok": (1, 2**16),
    "decoder_sparse_step": (1, 2**53),
}
BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob")
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}


def completed(config: dict[str, Any], defaults: Mapping[str, Any]) -> Any:
    """A config.json with all defaults; of its own type, which may have something to say of other missing keys.

    null counts as left out, except where it says that there is no window.

    Args:
        config: as it was read.
        defaults: of the architecture. There are also those of every decoder: as many key and value heads as query
            heads, of hidden size / heads each.

    Raises:
        CheckpointError: a value that can't be, or values that don't fit together.
    """
    given = type(config)({key: value for key, value in config.items() if value is not None or key in KEEPS_NULL})
    _check_values({**defaults, **given})
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    everywhere = {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": heads,
        "head_dim": hidden // heads,
    }  # fmt: skip
    result = type(config)({**everywhere, **defaults, **given})
    _check_heads(result)
    if result.get("layer_types") is not None:
        result["layer_types"] = _layer_types(result["layer_types"], result["num_hidden_layers"])
    return result


def _check_values(config: Mapping[str, Any]) -> None:
    for key, (least, most) in INTEGERS.items():
        value = config.get(key)
        if value is not None and not (is_int(value) and least <= value <= most):
            raise _wrong(key, f"an integer from {least} to {most:,}", value)
    for key in BOOLEANS:
        if not isinstance(config.get(key, False), bool):
            raise _wrong(key, "true or false", config[key])
    eps = config.get("rms_norm_eps", 1e-6)
    if not (is_number(eps) and eps >= 0):
        raise _wrong("rms_norm_eps", "a number >= 0", eps)
    layers = config.get("mlp_only_layers", [])
    if not (isinstance(layers, list) and all(is_int(layer) for layer in layers)):
        raise _wrong("mlp_only_layers", "a list of integers", layers)


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, kv_heads, head_dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        raise CheckpointError(
            f"The checkpoint's config.json has num_attention_heads={heads}, which is no multiple of "
            f"num_key_value_heads={kv_heads}."
        )
    if head_dim % 2 or not head_dim:
        raise CheckpointError(
            f"The checkpoint's config.json has heads of {head_dim} numbers each (head_dim, or hidden_size over "
            "num_attention_heads), but an even number is needed to rotate them."
        )


def _layer_types(types: Any, num_layers: int) -> list[str]:
    if not isinstance(types, list) or len(types) != num_layers:
        raise _wrong("layer_types", f"a list of num_hidden_layers={num_layers} names", types)
    for name in types:
        if not isinstance(name, str) or name not in LAYER_TYPES:
            raise _wrong("layer_types", "of full_attention and sliding_attention", name)
    return [LAYER_TYPES[name] for name in types]


def _wrong(key: str, wanted: str, value: Any) -> CheckpointError:
    return CheckpointError(f"The checkpoint's config.json: {key} must be {wanted}, got {shown(value):.60}.")
