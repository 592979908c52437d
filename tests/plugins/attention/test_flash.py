"""Which FlashAttention is taken, and why none; the kernels themselves are tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.component import Component
from nanoflow.plugins.attention import nanoflow_attention_backends, options
from nanoflow.plugins.attention.flash.backend import splits
from nanoflow.plugins.attention.flash.versions import VERSIONS, choose
from nanoflow.plugins.attention.options import FLASH_PACKAGES, FlashConfig
from nanoflow.testing.batches import context


def component(name: str) -> Component:
    return next(c for c in nanoflow_attention_backends() if c.name == name)


def test_none_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    monkeypatch.setattr(options, "no_gpu", lambda: None)
    for name in ("flash", "hybrid", "triton"):
        reason = component(name).available()
        assert reason is not None
        assert "pip install" in reason


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(options, "find_spec", lambda name: object())
    monkeypatch.setattr(options.ctypes, "CDLL", no_driver)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("flash", "hybrid", "triton"):
        assert component(name).available() == options.no_gpu()
    assert "it needs a GPU" in str(options.no_gpu())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert component("triton").available() is None


def test_each_version_comes_from_a_known_package() -> None:
    assert {version.module.partition(".")[0] for version in VERSIONS} == set(FLASH_PACKAGES)


def test_needs_a_gpu() -> None:
    assert choose(context(2, 64, 16))[1] == "it needs a GPU, and the engine runs on the device 'cpu'."
    assert component("flash").supports(FlashConfig(), context(2, 64, 16))
    assert component("hybrid").supports(FlashConfig(), context(2, 64, 16))


def test_float32_is_refused() -> None:
    _, reason = choose(context(2, 64, 16, torch.float32, torch.device("cuda")))
    assert reason == "FlashAttention serves float16 and bfloat16, not torch.float32."


@pytest.mark.parametrize("value", [-1, 1.5, 200, True])
def test_num_splits_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="num_splits"):
        FlashConfig(num_splits=value)


def test_few_sequences_are_split() -> None:
    counts = [splits(num_tiles, 132) for num_tiles in (1, 8, 64, 256, 2048)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1
    assert counts[-1] == 1
