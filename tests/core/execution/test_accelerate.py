"""`engine.accelerate=false`, and an operation that a package replaces: the tokens are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoflow import LLM
from nanoflow.core.config.engine_config import Config, EngineConfig, PluginChoice, SchedulerConfig
from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.execution import build_runner
from nanoflow.core.kernels.register import select_ops
from nanoflow.core.ops import Operation, Ops
from nanoflow.core.ops.norm import add_rms_norm
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of


def start(oracle: Oracle, **options: Any) -> LLM:
    return LLM(str(oracle("plain").folder), **{"dtype": "float32", "device": "cpu", "num_kv_blocks": 512} | options)


@pytest.mark.parametrize("accelerate", [True, False])
def test_a_replaced_operation_is_used_unless_nothing_is_accelerated(
    oracle: Oracle, accelerate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*args: Any) -> Any:
        calls.append(args)
        return add_rms_norm(*args)

    extra = [Operation("add_rms_norm", "cpu", counting)]
    monkeypatch.setattr(
        build_runner, "select_ops", lambda *args, **given: select_ops(*args, **given | {"extra": extra})
    )
    with start(oracle, accelerate=accelerate) as llm:
        check(llm, oracle("plain"))
        assert (engine_of(llm).executor.runner.ops == Ops()) == (not accelerate)
    assert bool(calls) == accelerate


def test_nothing_is_captured() -> None:
    class Capturable(AttentionBackend):
        capturable = capturable_chunks = True

    limits, cuda = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16), torch.device("cuda")
    for accelerate in (True, False):
        sizes = build_runner.graphs_to_capture(EngineConfig(accelerate=accelerate), limits, Capturable, cuda)
        assert all(map(bool, sizes)) == any(map(bool, sizes)) == accelerate


def test_attention_is_plain_pytorch_unless_it_is_named() -> None:
    for accelerate, name, picked in ((True, "auto", "auto"), (False, "auto", "torch"), (False, "triton", "triton")):
        config = Config(engine=EngineConfig(accelerate=accelerate), plugins={"attention": PluginChoice(name)})
        assert build_runner.pick_attention(config).name == picked
