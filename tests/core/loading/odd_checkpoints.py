"""Checkpoints as they are found in the wild: changes of a good one, drawn at random, and what is right then."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanoflow.testing.checkpoints import edit_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
POSITIONS = 64

Change = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


def unchanged(folder: Path) -> None:
    """What is right is what the checkpoint was before."""


def refused(folder: Path) -> None:
    """What is right is a sentence, though transformers makes something of it, and says more or less that it did."""


@dataclass
class Odd:
    """A change of a checkpoint.

    Attributes:
        name: of it.
        change: of the folder that nanoflow is given.
        oracle: of the one that transformers is given; the same by default.
        turn: when it comes: tensors are changed before they are renamed and put into several files.
    """

    name: str
    change: Change
    oracle: Change | None = None
    turn: int = 0


@dataclass
class Case:
    """A checkpoint, and changes of it."""

    model_type: str
    config: dict[str, Any]
    odds: list[Odd] = field(default_factory=list)

    def __str__(self) -> str:
        config = {key: value for key, value in self.config.items() if key != "model_type"}
        return f"{self.model_type} {config}: {'; '.join(odd.name for odd in self.odds)}"

    @property
    def is_refused(self) -> bool:
        return any(odd.oracle is refused for odd in self.odds)

    def make(self, good: Path, folder: Path, *, oracle: bool) -> Path:
        """Copy a good checkpoint, and change it."""
        shutil.copytree(good, folder)
        for odd in self.odds:
            (odd.oracle if oracle and odd.oracle is not None else odd.change)(folder)
        return folder


def draw_case(random: random.Random) -> Case:
    """A random checkpoint with one to three changes: at most one each of its rotation, its config and its files."""
    model_type = random.choice(["llama", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
    config: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": random.random() < 0.4}
    config["num_key_value_heads"] = random.choice([1, 2])
    if model_type == "qwen3_moe":
        config |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if model_type.startswith("qwen3"):
        config["head_dim"] = 16
    kinds = random.sample(KINDS, 3)[: random.choice([1, 1, 2, 3])]
    drawn = [kind(random, config) for kind in dict.fromkeys(kinds)]
    return Case(model_type, config, sorted(drawn, key=lambda odd: odd.turn))


def in_config(name: str, values: dict[str, Any], oracle: Change | None = None) -> Odd:
    """Values of config.json; `...` for none."""
    return Odd(f"config: {name} {values}", lambda folder: write_keys(folder, values), oracle)


def write_keys(folder: Path, values: dict[str, Any]) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(values)
        for key, value in values.items():
            if value is ...:
                del config[key]

    edit_json(folder / "config.json", change)


# Rotation ------------------------------------------------------------------------------------------------------------


def odd_rope(random: random.Random, config: dict[str, Any]) -> Odd:
    """Settings in one place, or in two that differ, complete or not."""
    values: dict[str, Any] = {"rope_parameters": ...}
    places = random.choice([["rope_parameters"], ["rope_scaling"], ["rope_parameters", "rope_scaling"], []])
    for place in places:
        values[place] = _rope_settings(random) if random.random() < 0.7 else random.choice([None, {}])
    for key, choices in {
        "rope_theta": [500.0, 10000, 1e6],
        "partial_rotary_factor": [0.5, 1.0],
        "original_max_position_embeddings": [16, 32],
    }.items():
        if random.random() < (0.5 if key == "rope_theta" else 0.15):
            values[key] = random.choice(choices)
    return in_config("rope", values)


def _rope_settings(random: random.Random) -> dict[str, Any]:
    rope_type = random.choice(["default", "linear", "dynamic", "yarn", "yarn", "llama3", "proportional", "longrope"])
    settings: dict[str, Any] = {}
    for key in random.choice([["type"], ["rope_type"], ["rope_type"], ["type", "rope_type"], []]):
        settings[key] = rope_type
    if random.random() < 0.5:
        settings["rope_theta"] = random.choice([300.0, 5000])
    if random.random() < 0.9:
        settings["factor"] = random.choice([2, 2.0, 4.0, 1.0])
    if rope_type == "llama3" and random.random() < 0.9:
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": random.choice([4.0, 2])}
    if rope_type in ("llama3", "yarn") and random.random() < 0.5:
        settings["original_max_position_embeddings"] = random.choice([16, 32])
    if rope_type == "yarn":
        extra = {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 0.9, "mscale": 0.7, "mscale_all_dim": 0.5,
                 "truncate": False}  # fmt: skip
        settings |= {key: value for key, value in extra.items() if random.random() < 0.25}
    if random.random() < 0.1:
        settings["partial_rotary_factor"] = random.choice([0.5, 1.0])
    return settings


# Keys ----------------------------------------------------------------------------------------------------------------

# What transformers takes null for, and which models have the key.
NULLABLE = {"head_dim": ("llama", "mistral"), "num_key_value_heads": ("llama", "qwen2", "qwen3")}
WITH_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": None, "hidden_act": None,
    "tie_word_embeddings": None,
    "attention_bias": ("llama", "qwen3", "qwen3_moe"), "mlp_bias": ("llama",), "sliding_window": ("mistral",),
    "norm_topk_prob": ("qwen3_moe",), "mlp_only_layers": ("qwen3_moe",), "decoder_sparse_step": ("qwen3_moe",),
    "num_experts_per_tok": ("qwen3_moe",), "moe_intermediate_size": ("qwen3_moe",), "rope_parameters": None,
}  # fmt: skip
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
           "vocab_size", "max_position_embeddings")  # fmt: skip


def odd_key(random: random.Random, config: dict[str, Any]) -> Odd:
    """A key that is missing, null, or has a value of a wrong type or size."""
    model_type = config["model_type"]
    what = random.choice(["missing", "null", "wrong", "wrong"])
    if what == "wrong":
        key = random.choice(NUMBERS)
        value = random.choice(["48", 1.5, -1, 10**9, 10**400, [2], True, {}])
        return in_config("wrong", {key: value}, refused)
    key = random.choice([key for key, models in WITH_DEFAULTS.items() if models is None or model_type in models])

    def remove(folder: Path) -> None:
        edit_json(folder / "config.json", lambda values: values.pop(key, None))

    def set_null(folder: Path) -> None:
        edit_json(folder / "config.json", lambda values: values.update({key: None}))

    if what == "missing":
        return Odd(f"config: no {key}", remove)
    # null is left out, also where transformers insists on a value
    is_theirs = key == "rope_parameters" or model_type in NULLABLE.get(key, ())
    if key == "sliding_window" or is_theirs:
        return Odd(f"config: null {key}", set_null)
    return Odd(f"config: null {key}", set_null, remove)


def odd_window(random: random.Random, config: dict[str, Any]) -> Odd:
    """Windows that are half switched on."""
    full, sliding = "full_attention", "sliding_attention"
    choices: dict[str, list[Any]] = {
        "use_sliding_window": [True, True, False],
        "sliding_window": [5, 9, None, 4096],
        "max_window_layers": [0, 1, 2, 28],
        "layer_types": [None, [full, sliding], [sliding, full], [sliding] * 2, [full] * 3, ["attention", sliding],
                        [full, "chunked"], "full_attention"],
    }  # fmt: skip
    values = {key: random.choice(options) for key, options in choices.items() if random.random() < 0.7}
    if config["model_type"] in ("llama", "mistral", "qwen3_moe"):
        values.pop("layer_types", None)
    if config["model_type"] == "llama":
        values.pop("sliding_window", None)  # transformers' Llama has none, but shortens its cache by it
    return in_config("window", values)


def odd_dtype(random: random.Random, config: dict[str, Any]) -> Odd:
    """A dtype in other words; weights are read in float32 whatever it is."""
    value = random.choice(["bfloat16", "torch.bfloat16", "bf16", "half", "float", "auto", None, "fp8", 5, {"": "half"}])
    key = random.choice(["dtype", "torch_dtype"])
    return in_config("dtype", {"dtype": ..., key: value} if key != "dtype" else {key: value}, unchanged)


# Files ---------------------------------------------------------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Apply `change` to the tensors of the only file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def in_weights(name: str, change: Callable[[Tensors], object], oracle: Change | None = None) -> Odd:
    return Odd(f"tensors: {name}", lambda folder: edit_weights(folder, change), oracle, turn=1)


def spoilt(folder: Path, name: str) -> None:
    """The same tensors with other numbers."""
    tensors = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {HEAD: torch.zeros(2, 2)}
    other = {tensor_name: torch.full_like(tensor, 0.01) for tensor_name, tensor in tensors.items()}
    save_file(other, folder / name, {"format": "pt"})


def sharded(folder: Path, names: tuple[str, ...] = ("model-00001-of-00002.safetensors", "b.safetensors")) -> None:
    """Two files and an index in place of one."""
    tensors = load_file(folder / WEIGHTS)
    parts: list[Tensors] = [{}, {}]
    for place, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[place % 2][name] = tensor
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {TABLE: "old.safetensors"}}))


def in_subfolder(folder: Path) -> None:
    (folder / "parts").mkdir()
    sharded(folder, ("parts/1.safetensors", "parts/2.safetensors"))


def named_in_config(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    spoilt(folder, "other.safetensors")
    write_keys(folder, {"transformers_weights": "weights.safetensors"})


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").unlink()


def with_index(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        sharded(folder)
        edit_json(folder / INDEX, change)

    return apply


def odd_files(random: random.Random, config: dict[str, Any]) -> Odd:
    """What lies in the folder, and which of it counts."""
    changes: dict[str, tuple[Change, Change | None]] = {
        "a later name": (lambda folder: spoilt(folder, "old_weights.safetensors"), None),
        "a copy": (lambda folder: spoilt(folder, "a.safetensors"), None),
        "consolidated": (lambda folder: spoilt(folder, "consolidated.safetensors"), None),
        "adapter's weights": (lambda folder: spoilt(folder, "adapter_model.safetensors"), None),
        "a pickle": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no"), None),
        "a stale index": (stale_index, None),
        "a stale index and its file": (lambda folder: (stale_index(folder), spoilt(folder, "old.safetensors")), None),
        "shards": (sharded, None),
        "shards in a folder": (in_subfolder, None),
        "shards and a spoilt one": (lambda folder: (sharded(folder), spoilt(folder, "a.safetensors")), None),
        "named in the config": (named_in_config, None),
        "a missing shard": (missing_shard, None),
        "an index without a map": (with_index(lambda index: index.pop("weight_map")), None),
        "an index of numbers": (with_index(lambda index: index["weight_map"].update(x=5)), None),
        "an index of null": (with_index(lambda index: index["weight_map"].update(x=None)), None),
        "an index of lists": (with_index(lambda index: index["weight_map"].update(x=["b.safetensors"])), None),
        "an index of long names": (with_index(lambda index: index["weight_map"].update(x="b" * 5000)), None),
        "an index that leads out": (with_index(lambda index: index["weight_map"].update(x="../a")), refused),
        "only another name": (lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors"), None),
        "a cut file": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64]), None),
    }  # fmt: skip
    name = random.choice(sorted(changes))
    return Odd(f"files: {name}", *changes[name], turn=3)


def odd_names(random: random.Random, config: dict[str, Any]) -> Odd:
    """Names as savers change them."""
    changes: dict[str, tuple[Callable[[str], str], Change | None]] = {
        "no prefix": (lambda name: name.removeprefix("model."), None),
        "two prefixes": (lambda name: "model." + name, None),
        "module.": (lambda name: "module." + name, unchanged),
        "_orig_mod.": (lambda name: "_orig_mod." + name, unchanged),
        "_orig_mod. within": (lambda name: name.replace("layers.", "_orig_mod.layers."), unchanged),
        "base_model.model.": (lambda name: "base_model.model." + name, unchanged),
        "language_model.": (lambda name: "language_model." + name, unchanged),
        "unknown.": (lambda name: "unknown." + name, None),
    }
    what = random.choice(sorted(changes))
    renamed, oracle = changes[what]

    def change(tensors: Tensors) -> None:
        values = {renamed(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(values)

    return Odd(f"names: {what}", lambda folder: edit_weights(folder, change), oracle, turn=2)


def odd_head(random: random.Random, config: dict[str, Any]) -> Odd:
    """The output head and the token embedding, of which the config says one thing and the files another."""

    def own(tensors: Tensors) -> None:
        tensors[HEAD] = 0.3 * torch.randn(tensors[TABLE].shape, generator=torch.Generator().manual_seed(5))

    def same(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[TABLE].clone()

    def only_head(tensors: Tensors) -> None:
        tensors.setdefault(HEAD, tensors[TABLE])
        del tensors[TABLE]

    def none(tensors: Tensors) -> None:
        tensors.pop(HEAD, None)

    change = random.choice([own, own, same, only_head, none])
    return in_weights(f"head: {change.__name__}", change)


def odd_tensors(random: random.Random, config: dict[str, Any]) -> Odd:
    """Tensors that are too many, too few, or none of this kind."""
    layer = "model.layers.1.self_attn."
    first = "model.layers.0.self_attn.q_proj.weight"

    def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({name: tensor})

    def cast(dtype: torch.dtype) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({first: tensors[first].to(dtype)})

    def drop(tensors: Tensors) -> None:
        del tensors[first]

    one = torch.ones(2)
    changes: dict[str, Odd] = {
        odd.name: odd
        for odd in (
            *(in_weights(f"buffer {name}", add(f"{layer}rotary_emb.{name}", one))
              for name in ("inv_freq", "cos_cached", "sin_cached")),
            in_weights("value head", add("v_head.summary.weight", one)),
            in_weights("a bias of zeros", add(f"{layer}o_proj.bias", torch.zeros(32))),
            in_weights("a bias of the head", add("lm_head.bias", one), refused),
            in_weights("something else", add(f"{layer}extra", one), refused),
            in_weights("another layer", add("model.layers.2.input_layernorm.weight", one), refused),
            in_weights("g_idx", add(f"{layer}q_proj.g_idx", one), refused),
            in_weights("lora", add(f"{layer}q_proj.lora_A.weight", one), refused),
            in_weights("int8", cast(torch.int8), refused),
            in_weights("float8", cast(torch.float8_e4m3fn), refused),
            in_weights("float64", cast(torch.float64)),
            in_weights("float16", cast(torch.float16)),
            in_weights("one is missing", drop),
            in_weights("a wrong shape", add("model.norm.weight", torch.ones(7))),
        )
    }  # fmt: skip
    return changes[random.choice(sorted(changes))]


# Those that have changed tokens without a word stand here more often.
KINDS = [
    *[odd_rope, odd_head, odd_window, odd_key] * 2, odd_rope, odd_dtype, odd_files, odd_names, odd_tensors
]  # fmt: skip
