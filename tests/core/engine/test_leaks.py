"""What requests and engines leave behind: no object, no slot, no block, no cost, no frozen garbage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.engine_config import Config, EngineConfig
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine import build
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.output_processor import RequestState
from nanoflow.core.engine.request import Request
from nanoflow.core.registry.registry import Registry
from tests.core.running import engine_of, greedy

PROMPT = [5, 6, 7, 8]
# One of each kind of request that the engine keeps something for.
WISHES: list[dict[str, Any]] = [
    {"prompt_logprobs": 1}, {"logprobs": 2}, {"n": 3, "temperature": 1.0}, {"stop": ["~"]}, {"repetition_penalty": 1.3},
    {"logit_bias": {3: 2.0}}, {"bad_words": ["King"]}, {"min_tokens": 9}, {"top_k": 5, "temperature": 1.0, "seed": 1},
    {"structured_outputs": StructuredOutputsParams(choice=["to be"])},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", num_kv_blocks=64, max_num_seqs=4, block_manager="plain")


def run(llm: LLM) -> None:
    """All wishes, more of them than slots, some of which are aborted."""
    engine = engine_of(llm)
    for number, wishes in enumerate(WISHES * 2):
        engine.add_request(str(number), PROMPT, SamplingParams(**{"max_tokens": 12} | wishes))
    for number in range(0, len(WISHES), 3):
        engine.step()
        engine.abort(str(number))
    while engine.has_unfinished:
        engine.step()


def calls(function: Callable[[], Any]) -> int:
    """How many functions are called in it, built-in ones too."""
    count = 0

    def notice(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def calls_of_steps(llm: LLM) -> list[int]:
    """Calls of each step of four greedy requests, behind their prefill."""
    engine = engine_of(llm)
    for number in range(4):
        engine.add_request(str(number), PROMPT, greedy(10))
    engine.step()
    counts = []
    while engine.has_unfinished:
        counts.append(calls(engine.step))
    return counts


def test_what_a_request_wanted_costs_nothing_when_it_has_ended(llm: LLM) -> None:
    calls_of_steps(llm)  # the first time fills caches
    before = calls_of_steps(llm)
    run(llm)
    assert calls_of_steps(llm) == before


def test_no_object_is_kept(llm: LLM) -> None:
    def alive() -> list[Any]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) in (Sequence, Request, RequestState)]

    run(llm)
    others = {id(thing) for thing in alive()}
    run(llm)
    assert [thing for thing in alive() if id(thing) not in others] == []
    engine = engine_of(llm)
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def frozen_by(llm: LLM, monkeypatch: pytest.MonkeyPatch, *, freeze_gc: bool) -> Engine:
    """The engine, as if it were just built with that option."""
    engine = engine_of(llm)
    monkeypatch.setattr(build, "_build_engine", lambda *_: (engine, {}))
    config = Config(engine=EngineConfig(device="cpu", freeze_gc=freeze_gc))
    built, _ = build.build_engine(config, Registry.load())
    assert isinstance(built, Engine)
    return built


def test_an_engine_leaves_the_garbage_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there when it is built is left out of collections until it is closed, if an option says so."""
    llm = LLM(dtype="float32", num_kv_blocks=8)
    assert gc.get_freeze_count() == 0
    built = frozen_by(llm, monkeypatch, freeze_gc=True)
    assert gc.get_freeze_count() > 0
    built.close()
    assert gc.get_freeze_count() == 0


def test_no_engine_touches_what_others_froze(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(dtype="float32", num_kv_blocks=8)
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        for freeze_gc in (True, False):
            frozen_by(llm, monkeypatch, freeze_gc=freeze_gc).close()
            assert 0 < gc.get_freeze_count() <= count
    finally:
        gc.unfreeze()


def test_without_the_option_nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(dtype="float32", num_kv_blocks=8)
    capabilities = replace(engine_of(llm).executor.capabilities, device_type="cuda")
    monkeypatch.setattr(engine_of(llm).executor, "capabilities", capabilities)
    frozen_by(llm, monkeypatch, freeze_gc=False)
    assert gc.get_freeze_count() == 0
