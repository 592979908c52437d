"""What doesn't fit into memory: a sentence, whatever raised it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import Config, EngineConfig
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.execution.out_of_memory import told_if_too_large
from nanoflow.core.loading.hub import resolve
from nanoflow.core.registry.component import Component
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.core.registry.registry import Registry

CPU = torch.device("cpu")


@pytest.fixture
def huge(tmp_path: Path) -> Config:
    """A checkpoint whose token embedding takes 4 TiB."""
    hf_config = json.loads((resolve("qwen3-0.6b") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf_config | {"vocab_size": 2**24, "hidden_size": 2**16}))
    return Config(str(tmp_path), EngineConfig(device="cpu", load_format="dummy"))


def test_weights(huge: Config) -> None:
    with pytest.raises(ConfigError, match=r"^There is no room for the weights on cpu, where [\d.]+ GiB are left; "):
        LLM.from_config(huge)


def test_weights_of_somebody_s_model(huge: Config) -> None:
    """GPUs say it in another way, and models of other packages have no care of their own."""

    def build(config: object, context: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 TiB.")

    @hookimpl
    def nanoflow_models() -> list[Component]:
        return [Component("theirs", build=build, architectures=("Theirs",))]

    file = Path(huge.checkpoint) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["Theirs"]}))
    plugin = SimpleNamespace(nanoflow_models=nanoflow_models)
    point = SimpleNamespace(name="theirs", dist=None, load=lambda: plugin)
    with pytest.raises(ConfigError, match=r"^There is no room for the weights on cpu"):
        LLM.from_config(huge, Registry.load(strict=True, extra=[point]))


def test_the_kv_cache() -> None:
    engine = replace(EngineConfig(), device="cpu", num_kv_blocks=2**31)
    with pytest.raises(ConfigError, match=r"no room for a KV cache of 2147483648 blocks .* lower engine.num_kv_blocks"):
        LLM.from_config(Config(engine=engine))


def test_of_a_gpu_it_tells_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 24 * 2**30))
    expected = "There is no room for the weights on cuda:1, where 0.5 of 24.0 GiB are left; take less."
    with pytest.raises(ConfigError) as raised, told_if_too_large("the weights", torch.device("cuda:1"), "take less"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(raised.value) == expected


@pytest.mark.parametrize("error", [RuntimeError("a kernel"), ValueError("memory")])
def test_any_other_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told_if_too_large("the weights", CPU, "take less"):
        raise error
    assert raised.value is error
