"""Folders and files that hold a model in a form that isn't read: a sentence that leads somewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanoflow import LLM
from nanoflow.core.config.errors import CheckpointError, ConfigError
from nanoflow.core.loading.safetensors import load_weights
from nanoflow.core.loading.weight_files import weight_files
from nanoflow.testing.checkpoints import edit_json
from tests.core.checkpoints import Oracle
from tests.core.loading.odd_checkpoints import INDEX, WEIGHTS, edit_weights, sharded
from tests.core.sentences import raises_sentence

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def folder(oracle: Oracle, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(oracle("plain").folder, tmp_path / "checkpoint"))


def refuse(folder: Path | str, *words: str, error: type[Any] = CheckpointError, **options: Any) -> None:
    with raises_sentence(error, *words), LLM(str(folder), num_kv_blocks=8, **options):
        pass


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "a.pth"])
def test_pickles_are_converted_once(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refuse(folder, "pickle", name, "from_pretrained(", "save_pretrained(")


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-Q4_K_M.gguf", ("GGUF", "llama.cpp", "original checkpoint")),
        ("model.onnx", ("ONNX", "exported from")),
    ],
)
def test_other_formats(folder: Path, name: str, words: tuple[str, ...], has_config: bool) -> None:
    (folder / WEIGHTS).rename(folder / name)
    if not has_config:
        (folder / "config.json").unlink()
    refuse(folder, str(folder), *words)


def test_a_gguf_file(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "m.gguf")
    refuse(folder / "m.gguf", "m.gguf holds a model in GGUF", "original checkpoint")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.safetensors"])
def test_the_publishers_own_format(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refuse(folder, "publisher's own format", "model.safetensors")
    (folder / "config.json").rename(folder / "params.json")
    refuse(folder, "publisher's own format", "config.json")


def test_an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    refuse(folder, "adapter (LoRA)", "merge_and_unload()")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "them/theirs-7b"}))
    refuse(folder, "adapter (LoRA) of them/theirs-7b", "merge_and_unload()")
    (folder / "adapter_config.json").write_text("[")
    refuse(folder, "holds an adapter (LoRA), not a whole model")


def test_weights_of_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    refuse(folder, "neither model.safetensors nor", "weights.safetensors", "rename")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    refuse(folder, f"{name} is a pointer of Git LFS", "git lfs pull")


def test_a_shard_that_is_a_pointer(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").write_text(POINTER)
    refuse(folder, "b.safetensors is a pointer of Git LFS")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "b.safetensors"])
def test_a_pipe_is_never_opened(folder: Path, name: str) -> None:
    if name == "b.safetensors":
        sharded(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refuse(folder, f"{name} is no regular file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there are no devices")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_device_is_never_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refuse(folder, f"{name} is no regular file")


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("gone")
    refuse(folder, "model.safetensors is no regular file")


def test_links_into_a_cache_are_followed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to("../blob")
    assert weight_files(folder) == [folder / WEIGHTS]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "names 5 where"), (None, "names None where"), (["a"], "names ['a'] where"), ({}, "names {} where"),
        ("", "names '' where"), ("a\0b", "where the name"), ("b" * 5000, "of 5000 letters"),
        ("../a.safetensors", "lies out of"), ("x/../../a.safetensors", "lies out of"), ("/etc/passwd", "lies out of"),
        ("..\\a.safetensors", "lies out of"), ("C:\\a.safetensors", "lies out of"),
    ],
)  # fmt: skip
def test_indexes_with_strange_files(folder: Path, value: Any, words: str) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["x"] = value
    (folder / INDEX).write_text(json.dumps(index))
    with raises_sentence(CheckpointError, INDEX, words):
        weight_files(folder)


@pytest.mark.parametrize("value", ["../a.safetensors", 5, "weights.bin", "gone.safetensors", "x" * 300])
def test_strange_names_of_weights_in_the_config(folder: Path, value: Any) -> None:
    edit_json(folder / "config.json", lambda c: c.update(transformers_weights=value))
    with raises_sentence(CheckpointError, str(folder)):
        weight_files(folder)


def test_what_counts_of_several_files(folder: Path) -> None:
    """As transformers does: the file that the config names, the whole model, the index; nothing else."""
    (folder / "a.safetensors").write_bytes(b"")
    assert weight_files(folder) == [folder / WEIGHTS]
    shutil.copyfile(folder / WEIGHTS, folder / "copy.safetensors")
    sharded(folder)
    assert weight_files(folder) == [folder / "b.safetensors", folder / "model-00001-of-00002.safetensors"]
    shutil.copyfile(folder / "copy.safetensors", folder / WEIGHTS)
    assert weight_files(folder) == [folder / WEIGHTS]
    edit_json(folder / "config.json", lambda c: c.update(transformers_weights="copy.safetensors"))
    assert weight_files(folder) == [folder / "copy.safetensors"]
    edit_json(folder / "config.json", lambda c: c.update(transformers_weights=INDEX))
    assert weight_files(folder) == [folder / "b.safetensors", folder / "model-00001-of-00002.safetensors"]


def test_the_last_file_that_holds_a_tensor_counts(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    load_weights(tmp_path, {"x": (target := torch.zeros(2))})
    assert target.tolist() == [1, 1]


def test_nothing_is_read_before_all_is_checked(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    names = {"model.embed_tokens.weight": torch.zeros(128, 48), "model.norm.weight": torch.zeros(48)}
    with pytest.raises(CheckpointError):
        load_weights(folder, names)
    assert not names["model.embed_tokens.weight"].any()


def test_a_file_without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    refuse(folder, "holds no tensors")


SPOIL: dict[str, Callable[[Path], object]] = {
    "deep": lambda file: file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "digits": lambda file: file.write_text('{"hidden_size": ' + "9" * 5000 + "}"),
    "latin": lambda file: file.write_bytes(b'{"a": "\xff"}'),
    "large": lambda file: file.write_text('{"a": "' + "b" * (65 * 2**20) + '"}'),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("how", SPOIL)
def test_json_that_cannot_be_read(folder: Path, name: str, how: str) -> None:
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    SPOIL[how](folder / name)
    refuse(folder, name, "64" if how == "large" else "can't be read as JSON")


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/x", "a/b/c" * 200, "x\0y", "é" * 200])
def test_strange_names_of_checkpoints(name: str) -> None:
    refuse(name, "Checkpoint ")


def test_dummy_weights_need_no_files(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS) if hasattr(os, "mkfifo") else None
    LLM(str(folder), load_format="dummy", num_kv_blocks=8).close()


def test_a_limit_of_tokens_that_is_asked_for(folder: Path) -> None:
    refuse(folder, "max_model_len is 300", "at most 256", error=ConfigError, max_model_len=300)
