"""Observers: what they are told, in what order, and what they cost where there are none."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nanoflow import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanoflow.core.contracts.observer import Observer
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import PreemptReason, WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.observers import Observers
from tests.core.running import engine_of, greedy
from tests.core.scripted import byte_level, scripted_llm

ROOMS = ("core/engine", "core/contracts", "core/data", "plugins/schedulers", "plugins/block_managers")


class Notebook(Observer):
    """Writes all down."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []

    def on_add(self, sequence: Sequence) -> None:
        self.notes.append(("add", sequence.request_id))

    def on_preempt(self, sequence: Sequence, reason: PreemptReason | None) -> None:
        self.notes.append(("preempt", sequence.request_id, reason))

    def on_schedule(self, batch: Batch, reasons: list[WaitReason]) -> None:
        self.notes.append(("schedule", [s.request_id for s in batch.sequences], reasons))

    def on_submit(self, batch: Batch) -> None:
        self.notes.append(("submit", [s.request_id for s in batch.sequences]))

    def on_result(self, batch: Batch) -> None:
        self.notes.append(("result", [s.request_id for s in batch.sequences]))

    def on_finish(self, sequence: Sequence) -> None:
        assert not sequence.block_table
        self.notes.append(("finish", sequence.request_id, sequence.finish_reason))

    def on_evict(self, block: int) -> None:
        self.notes.append(("evict", block))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [note for note in self.notes if note[0] in kinds]


def observed(llm: LLM, *observers: Observer) -> Engine:
    """The engine below, as if it had been built with these observers."""
    engine = engine_of(llm)
    engine.observers = Observers.watching(observers, engine.block_manager)
    return engine


def run(engine: Engine) -> None:
    while engine.has_unfinished or engine.in_flight:
        engine.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_life_of_a_request(tmp_path: Path, overlap: bool) -> None:
    with scripted_llm(tmp_path, [5, 6, 7], overlap=overlap) as llm:
        engine = observed(llm, notebook := Notebook())
        engine.add_request("a", [1], greedy(2))
        run(engine)
        assert notebook.of("add", "finish") == [("add", "a"), ("finish", "a", "length")]
        kinds = [note[0] for note in notebook.notes]
        step = ["schedule", "submit", "result"]
        if not overlap:
            assert kinds == ["add", *step, *step, "finish"]
        assert kinds.count("schedule") == kinds.count("submit") == kinds.count("result") >= 2
        engine.add_request("b", [1], greedy(2, n=2))
        assert engine.abort("b") is not None
        assert notebook.notes[-4:] == [("add", "b#0"), ("add", "b#1"), ("finish", "b#0", "abort"),
                                       ("finish", "b#1", "abort")]  # fmt: skip


def test_reasons_of_waiting(tmp_path: Path) -> None:
    """Each cause, with the number of those behind; an engine in debug mode checks that they are true."""
    options = {"debug": True, "num_kv_blocks": 8, "block_size": 4, "overlap": False}
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 12}
    with scripted_llm(tmp_path, [5], byte_level(), scheduler=limits, **options) as llm:
        engine = observed(llm, notebook := Notebook())
        for name, length, max_tokens in (("a", 10, 8), ("b", 10, 8), ("c", 3, 8), ("d", 3, 8), ("e", 3, 8)):
            engine.add_request(name, [1 + ord(name)] * length, greedy(max_tokens))
        run(engine)
        reasons = [reason for _, _, some in notebook.of("schedule") for reason in some]
        assert reasons[0] == WaitReason(WaitCause.NO_BUDGET, "c", 1, 0, 2)
        assert {reason.cause for reason in reasons} >= {
            WaitCause.NO_BUDGET, WaitCause.NO_BLOCKS, WaitCause.MAX_NUM_SEQS, WaitCause.GAVE_WAY,
        }  # fmt: skip
        preemptions = notebook.of("preempt")
        assert len(preemptions) == engine.stats.num_preemptions > 0
        assert all(reason.request_id == name and reason.needed > reason.free for _, name, reason in preemptions)


def test_a_request_whose_grammar_is_compiled_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future

    with scripted_llm(tmp_path, [5], byte_level()) as llm:
        engine = observed(llm, notebook := Notebook())
        monkeypatch.setattr(engine.processors.by_name["grammar"].compiler, "submit", lambda _: Future())
        engine.add_request("held", [1], greedy(structured_outputs=StructuredOutputsParams(regex="a")))
        engine.add_request("free", [1], greedy(2))
        engine.step()
        assert notebook.of("schedule")[0][2] == [WaitReason(WaitCause.NOT_READY, "held")]
        engine.abort("held")
        run(engine)


@pytest.mark.parametrize("manager", ["prefix", "radix"])
def test_evictions(manager: str) -> None:
    options = {"device": "cpu", "block_size": 4, "num_kv_blocks": 8, "max_num_seqs": 2, "block_manager": manager}
    for debug in (False, True):
        with LLM(debug=debug, **options) as llm:
            engine = observed(llm, notebook := Notebook())
            for index in range(4):
                engine.add_request(str(index), [10 + index] * 9, greedy(4))
                run(engine)
            evicted = [block for _, block in notebook.of("evict")]
            assert len(evicted) >= 4
            assert set(evicted) <= set(range(8))


def test_schedulers_without_reasons_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_kv_blocks": 8, "block_size": 4, "overlap": False}
    with scripted_llm(tmp_path, [5], scheduler={"max_num_seqs": 3}, **options) as llm:
        engine = observed(llm, notebook := Notebook())
        schedule = engine.scheduler.schedule

        def silent() -> Batch | None:
            batch = schedule()
            if batch is not None:
                batch.preempt_reasons = []
            return batch

        monkeypatch.setattr(engine.scheduler, "schedule", silent)
        monkeypatch.setattr(engine.scheduler, "wait_reason", lambda: None)
        for name in "abcde":
            engine.add_request(name, [1 + ord(name)] * 10, greedy(8))
        run(engine)
        assert all(reasons == [] for _, _, reasons in notebook.of("schedule"))
        assert {reason for _, _, reason in notebook.of("preempt")} == {None}


def test_an_observer_that_fails_is_told_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Notebook):
        def on_submit(self, batch: Batch) -> None:
            super().on_submit(batch)
            raise RuntimeError("no ink")

    with scripted_llm(tmp_path, [5, 6, 7]) as llm, caplog.at_level(logging.WARNING, "nanoflow"):
        engine = observed(llm, fails := Fails(), other := Notebook())
        engine.add_request("a", [1], greedy(3))
        run(engine)
        assert [note[0] for note in fails.notes] == ["add", "schedule", "submit"]
        assert other.notes[-1] == ("finish", "a", "length")
        (record,) = caplog.records
        assert record.getMessage() == "observer Fails failed in on_submit and is told nothing more"


def test_times_are_on_the_engines_clock(tmp_path: Path) -> None:
    with scripted_llm(tmp_path, [5, 6, 7], overlap=False) as llm:
        engine = engine_of(llm)
        now = 100.0
        engine.clock = lambda: now
        engine.add_request("a", [1], greedy(3), output_kind=RequestOutputKind.CUMULATIVE)
        times = []
        while engine.has_unfinished:
            now += 10
            (output,) = engine.step()
            times.append((output.metrics.arrival_time, output.metrics.first_token_time, output.metrics.finished_time))
        assert times == [(100.0, 110.0, None), (100.0, 110.0, None), (100.0, 110.0, 130.0)]
        assert output.metrics.ttft == 10.0


def python_calls(engine: Engine) -> list[str]:
    """Python functions of the engine, the scheduler, block manager and their data that a decode step calls."""
    calls = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and (name == "<string>" or any(room in name for room in ROOMS)):
            calls.append(f"{name}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(("kind", "most"), [("FINAL_ONLY", 272), ("DELTA", 563)])
@pytest.mark.parametrize("num_waiting", [0, 3])
def test_no_observer_costs_nothing(tmp_path: Path, num_waiting: int, kind: str, most: int) -> None:
    """A decode step of 16 sequences calls no more Python functions than before there were observers."""
    with scripted_llm(tmp_path, [5, 6, 7], overlap=False, scheduler={"max_num_seqs": 16}) as llm:
        engine = engine_of(llm)
        assert engine.observers is None
        for index in range(16 + num_waiting):
            engine.add_request(str(index), [1, index], greedy(20), output_kind=RequestOutputKind(kind))
        for _ in range(3):
            engine.step()
        steps = [python_calls(engine) for _ in range(5)]
        assert min(map(len, steps)) <= most
        words = ("observer", "reason")
        assert not [call for calls in steps for call in calls if any(word in call for word in words)]
        engine.observers = Observers.watching([Observer()], engine.block_manager)
        assert any("observer" in call for call in python_calls(engine))
        run(engine)


def test_salted_prefixes_are_not_shared(tmp_path: Path) -> None:
    with scripted_llm(tmp_path, [5, 6, 7], block_size=2) as llm:
        salts = ["a", None, "b", "a", None, "b", "é"]
        params = [SamplingParams(temperature=0, max_tokens=1, cache_salt=salt) for salt in salts]
        found = [llm.generate([[1, 2, 3, 4, 5]], param, use_tqdm=False)[0].num_cached_tokens for param in params]
        assert found == [0, 0, 0, 4, 4, 4, 0]
