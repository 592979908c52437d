"""docs/troubleshooting.md: its table is reckoned rightly, and what it quotes and advises exists."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanoflow.core.config.engine_config import EngineConfig, SchedulerConfig
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.loading.hub import resolve
from nanoflow.workloads.floor import Dims

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
FITS = ROOT / "benchmarks" / "fits.py"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(FITS.parent)
    module = __import__("fits")
    yield module
    del sys.modules["fits"]


def test_the_table_is_what_the_script_prints(fits: Any) -> None:
    assert fits.table() in TEXT


@pytest.mark.parametrize("name", ["qwen3-0.6b", "Llama 3.1 8B", "qwen3-30b-a3b"])
def test_weights_are_those_of_transformers(fits: Any, name: str) -> None:
    """Tied, untied, and a mixture of experts."""
    hf_config = fits.config_of(name)
    config = AutoConfig.for_model(**{"model_type": "llama"} | hf_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert fits.weight_bytes(Dims.from_config(hf_config, 2), hf_config) == pytest.approx(expected, rel=1e-3)


def test_room_is_what_is_left(fits: Any) -> None:
    """2 GiB for steps, the weights, and the rest in pieces of one token's keys and values."""
    dims = Dims.from_config(fits.config_of("qwen3-0.6b"), 2)
    assert dims.kv_bytes_per_token == 2 * 2 * 28 * 8 * 128
    found = fits.tokens(dims, 3 * fits.GIB, card=100, share=0.5)
    assert found == int((0.5 * 98 - 2 - 3) * fits.GIB / dims.kv_bytes_per_token)
    assert fits.shown(999) == "no"
    assert fits.shown(1_135_999) == "1,135k"


def test_the_script_for_another_checkpoint(
    fits: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(resolve("bard"))
    monkeypatch.setattr(sys, "argv", [str(FITS), folder, "--share", "0.5"])
    assert fits.main() == 0
    assert f"| {folder} | 0.0 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(FITS), "qwen3-0.6"])
    assert "Did you mean 'qwen3-0.6b'" in fits.main()


def test_options_exist() -> None:
    known = {"engine": EngineConfig, "scheduler": SchedulerConfig, "sampling": SamplingParams}
    for room, name in re.findall(r"`(engine|scheduler|sampling)\.(\w+)", TEXT):
        assert name in {field.name for field in fields(known[room])}, f"{room}.{name}"


def test_quoted_errors_are_there() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanoflow/core").rglob("*.py")))
    code = re.sub(r'"\s+f?"', "", code)
    quoted = re.findall(r'^\| "([^"]+)"', TEXT, re.MULTILINE)
    assert len(quoted) >= 4
    for sentence in quoted:
        for part in filter(None, re.split(r" ?\.\.\. ?", sentence)):
            assert part in code, part
