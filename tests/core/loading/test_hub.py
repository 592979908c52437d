"""What is asked of the Hub: configs and tokenizers, then the files that the weights are read from, and no others."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.loading.hub import resolve
from nanoflow.testing.checkpoints import edit_json
from tests.core.checkpoints import Oracle
from tests.core.loading.odd_checkpoints import INDEX, WEIGHTS, sharded
from tests.core.sentences import raises_sentence

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BESIDE = ["consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md", "a.gguf"]


class Hub:
    """A Hub with one repository, that of a folder, and a cache of its own."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.folder = cache / COMMIT
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, name: str, *, revision: str | None = None, allow_patterns: Any, ignore_patterns: Any = ()
    ) -> str:  # fmt: skip
        self.revisions.append(revision)
        for file in self.list_repo_files(name):
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns):
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source / file, self.folder / file)
        return str(self.folder)

    def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
        return [str(file.relative_to(self.source)) for file in self.source.rglob("*") if file.is_file()]

    @property
    def fetched(self) -> set[str]:
        return {str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture
def hub(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    source = Path(shutil.copytree(oracle("plain").folder, tmp_path / "repository"))
    for name in BESIDE:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    hub = Hub(source, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", hub.list_repo_files)
    return hub


def test_without_weights(hub: Hub) -> None:
    assert resolve("them/theirs") == hub.folder
    assert hub.fetched == {"config.json", "generation_config.json"}


def test_one_file(hub: Hub) -> None:
    assert resolve("them/theirs", weights=True) == hub.folder
    assert hub.fetched == {"config.json", "generation_config.json", WEIGHTS}
    assert hub.revisions == [None, COMMIT]  # all files are of one commit


def test_one_file_beside_an_index(hub: Hub) -> None:
    shutil.copyfile(hub.source / WEIGHTS, hub.source / "copy")
    sharded(hub.source)
    (hub.source / "copy").rename(hub.source / WEIGHTS)
    resolve("them/theirs", weights=True)
    assert hub.fetched == {"config.json", "generation_config.json", INDEX, WEIGHTS}


def test_files_of_an_index(hub: Hub) -> None:
    sharded(hub.source, ("model-[1].safetensors", "b.safetensors"))
    resolve("them/theirs", weights=True)
    shards = {"model-[1].safetensors", "b.safetensors"}
    assert hub.fetched == {"config.json", "generation_config.json", INDEX} | shards


def test_a_file_that_the_config_names(hub: Hub) -> None:
    (hub.source / WEIGHTS).rename(hub.source / "weights.safetensors")
    edit_json(hub.source / "config.json", lambda c: c.update(transformers_weights="weights.safetensors"))
    resolve("them/theirs", weights=True)
    assert hub.fetched == {"config.json", "generation_config.json", "weights.safetensors"}


def test_a_repository_without_safetensors(hub: Hub) -> None:
    for file in hub.source.glob("*.safetensors"):
        file.unlink()
    with raises_sentence(CheckpointError, "them/theirs", "pickle", "pytorch_model.bin"):
        resolve("them/theirs", weights=True)


def test_a_repository_that_cannot_be_listed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    (hub.source / WEIGHTS).unlink()
    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    with raises_sentence(CheckpointError, "them/theirs", "no network", "HF_HUB_OFFLINE"):
        resolve("them/theirs", weights=True)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_engine_asks_for_weights_that_it_reads(hub: Hub, load_format: str) -> None:
    from nanoflow import LLM

    LLM("them/theirs", load_format=load_format, num_kv_blocks=8).close()
    assert (WEIGHTS in hub.fetched) == (load_format == "auto")
