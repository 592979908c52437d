"""Names of tensors as savers change them, and tensors that no parameter takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.loading.safetensors import has_own_head, load_weights
from tests.core.sentences import raises_sentence

LAYER = "model.layers.0.self_attn.q_proj"
NAMES = ["model.embed_tokens.weight", f"{LAYER}.weight", "model.norm.weight", "lm_head.weight"]


def stored(
    folder: Path, *, rename: Callable[[str], str] = str, dtype: torch.dtype = torch.float32, **more: torch.Tensor
) -> Path:
    """A checkpoint whose tensors are full of 1, 2, 3 and 4; and more of them."""
    tensors = {rename(name): torch.full((4, 2), float(place + 1)).to(dtype) for place, name in enumerate(NAMES)}
    save_file(tensors | more, folder / "model.safetensors")
    return folder


def load(folder: Path, tied: bool = False) -> list[float]:
    targets = {name: torch.zeros(4, 2) for name in NAMES}
    load_weights(folder, targets | ({"lm_head.weight": None} if tied else {}))
    return [target[0, 0].item() for target in targets.values()]


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "base_model.model.", "language_model.",
     "model.", "_fsdp_wrapped_module.", "base_model.model._orig_mod."],
)  # fmt: skip
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    assert load(stored(tmp_path, rename=lambda name: prefix + name)) == [1, 2, 3, 4]


@pytest.mark.parametrize("within", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_within_names(within: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, rename=lambda name: name.replace("layers.0.", f"layers.0.{within}."))
    assert load(folder) == [1, 2, 3, 4]


def test_a_base_model_lacks_its_prefix(tmp_path: Path) -> None:
    assert load(stored(tmp_path, rename=lambda name: name.removeprefix("model."))) == [1, 2, 3, 4]


def test_an_unknown_prefix(tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, "holds 'thinker.", "no place for"):
        load(stored(tmp_path, rename=lambda name: "thinker." + name))


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, "holds both", "which are one tensor"):
        load(stored(tmp_path, **{"norm.weight": torch.zeros(4, 2)}))


@pytest.mark.parametrize(
    "name",
    ["inv_freq", "cos_cached", "sin_cached", "original_inv_freq"],
)
@pytest.mark.parametrize("prefix", ["model.layers.0.self_attn.", "model.", "", "module.model."])
def test_buffers_of_rotation_are_passed_over(prefix: str, name: str, tmp_path: Path) -> None:
    assert load(stored(tmp_path, **{f"{prefix}rotary_emb.{name}": torch.ones(3)})) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "classifier.weight", "mtp.layers.0.weight"])
def test_parts_for_other_tasks_are_passed_over_with_a_warning(name: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"no use for are passed over: {name.partition('.')[0]}\."):
        assert load(stored(tmp_path, **{name: torch.ones(3)})) == [1, 2, 3, 4]


def test_a_bias_that_the_model_lacks_matters_unless_it_is_zero(tmp_path: Path) -> None:
    assert load(stored(tmp_path, **{f"{LAYER}.bias": torch.zeros(4)})) == [1, 2, 3, 4]
    for name in ("lm_head.bias", f"{LAYER}.bias"):
        with raises_sentence(CheckpointError, name, "no place for"):
            load(stored(tmp_path, **{name: torch.tensor([0.0, 1.0])}))


@pytest.mark.parametrize(
    "end",
    ["qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_packed", "SCB",
     "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "codebooks"],
)  # fmt: skip
def test_parts_of_quantized_weights(end: str, tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, f"'{LAYER}.{end}'", "quantized weights", "original checkpoint"):
        load(stored(tmp_path, **{f"{LAYER}.{end}": torch.ones(2)}))


@pytest.mark.parametrize(
    "end", ["lora_A.weight", "lora_B.default.weight", "base_layer.weight", "lora_magnitude_vector"]
)
def test_parts_of_adapters(end: str, tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, end, "adapter (LoRA)", "merge_and_unload()"):
        load(stored(tmp_path, **{f"base_model.model.{LAYER}.{end}": torch.ones(2)}))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32"), (torch.int64, "I64"), (torch.bool, "BOOL"),
     (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")],
)  # fmt: skip
def test_numbers_that_are_no_weights(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    with raises_sentence(CheckpointError, f"is in {name}", "quantized"):
        load(stored(tmp_path, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    assert load(stored(tmp_path, dtype=dtype)) == [1, 2, 3, 4]


def test_a_tied_head_is_passed_over(tmp_path: Path) -> None:
    assert load(stored(tmp_path), tied=True) == [1, 2, 3, 0]


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_only_the_head_is_stored(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: torch.full((4, 2), float(place + 1)) for place, name in enumerate(NAMES)}
    del tensors[prefix + "model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path, tied=True) == [4, 2, 3, 0]
    with raises_sentence(CheckpointError, "lacks 1 tensors", "embed_tokens"):
        load(tmp_path)


@pytest.mark.parametrize("rows", [4, 5000])
def test_whether_a_head_is_its_own(rows: int, tmp_path: Path) -> None:
    table = torch.randn(rows, 3)
    other = table.clone()
    other[-1, -1] += 1

    def is_own(**tensors: torch.Tensor) -> bool:
        save_file({name + ".weight": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return has_own_head(tmp_path)

    assert is_own(embed_tokens=table, lm_head=other)
    assert not is_own(embed_tokens=table, lm_head=table.clone())
    assert not is_own(embed_tokens=table.bfloat16(), lm_head=table.bfloat16().float())
    assert is_own(wte=table, lm_head=other)
    assert not is_own(embed_tokens=table, norm=other)
    assert not is_own(lm_head=table, norm=other)
