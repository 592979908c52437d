"""The observer that logs what makes an engine slow."""

from __future__ import annotations

import logging

import pytest

from nanoflow import LLM
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.observer import ObserverContext
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence
from nanoflow.plugins.observers import nanoflow_observers
from nanoflow.plugins.observers.log import LogConfig, LogObserver


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(clock: Clock, caplog: pytest.LogCaptureFixture) -> LogObserver:
    caplog.set_level(logging.WARNING, "nanoflow")
    (component,) = nanoflow_observers()
    assert component.name == "log"
    context = ObserverContext(clock, num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=64)
    return component.build(LogConfig(slow_step=1.0, preemptions=3, period=10.0), context)


def step(observer: LogObserver, clock: Clock, seconds: float, reasons: list[WaitReason]) -> None:
    batch = Batch()
    batch.add(Sequence("a", [1, 2, 3], SamplingParams(), max_tokens=2), 3)
    observer.on_schedule(batch, reasons)
    observer.on_submit(batch)
    clock.now += seconds
    observer.on_result(batch)


def test_it_is_silent_while_all_is_well(observer: LogObserver, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        step(observer, clock, 0.9, [])
        observer.on_preempt(Sequence("a", [1], SamplingParams(), max_tokens=2), None)
        clock.now += 5
    assert caplog.messages == []


def test_slow_steps(observer: LogObserver, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Not more often than once a period, and with who waits."""
    reason = WaitReason(WaitCause.MAX_NUM_SEQS, "b", 1, 0, 4)
    for _ in range(6):
        step(observer, clock, 3.0, [reason])
    first = "a step of 1 sequences and 3 tokens took 3.0 s (5 sequences wait, the first for max_num_seqs)"
    assert caplog.messages == [first] * 2


def test_storms_of_preemptions(observer: LogObserver, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        observer.on_preempt(Sequence("a", [1], SamplingParams(), max_tokens=2), None)
        clock.now += 1
    (message,) = caplog.messages
    assert message.startswith("3 times in 10 s a sequence lost its KV blocks, of which there are 8, and is computed")


@pytest.mark.parametrize("options", [{"slow_step": 0}, {"preemptions": 0}, {"preemptions": 1.5}, {"period": "long"}])
def test_options_out_of_their_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"observers.{next(iter(options))}"):
        LogConfig(**options)  # type: ignore[arg-type]


def test_an_engine_with_the_observer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nanoflow")
    with LLM(device="cpu", num_kv_blocks=64, observers=["log"]) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert caplog.messages == []
    with LLM(device="cpu", num_kv_blocks=64, observers=[{"name": "log", "slow_step": 1e-9}]) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    (message,) = caplog.messages
    assert message.startswith("a step of 1 sequences and 3 tokens took 0.0 s")
