"""One `LLM` and several callers: threads, streams in turns, Ctrl-C, and forked processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from nanoflow import LLM, AsyncLLM, SamplingParams
from nanoflow.core.api import forks
from nanoflow.core.api.interrupts import deferred_interrupts
from nanoflow.core.config.errors import NanoflowError
from tests.core.running import engine_of, greedy, tokens
from tests.core.sentences import raises_sentence

PROMPTS = [f"HAMLET:\nWhat {word}" for word in ("now", "then", "a piece of work", "is he", "if")]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", num_kv_blocks=300, max_num_seqs=8) as llm:
        yield llm
        assert not engine_of(llm).has_unfinished
        assert engine_of(llm).block_manager.num_free_blocks == 300


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler is restored"
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def in_step(llm: LLM, number: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of the step of that number from now on."""
    executor, left = engine_of(llm).executor, iter(range(number))
    submit = executor.submit

    def submit_and_act(batch: Any) -> Any:
        step = submit(batch)
        if next(left, None) is None:
            monkeypatch.setattr(executor, "submit", submit)
            action()
        return step

    monkeypatch.setattr(executor, "submit", submit_and_act)


def answers(llm: LLM, **params: Any) -> list[list[int]]:
    return tokens(llm.generate(PROMPTS, greedy(20, **params), use_tqdm=False))


def test_ctrl_c_aborts_the_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps, and no other call: a stream that was begun before goes on."""
    expected = answers(llm)
    stream = llm.stream(PROMPTS, greedy(20))
    first = next(stream)
    assert not first.finished
    in_step(llm, 5, ctrl_c, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        answers(llm)
    assert len(engine_of(llm).requests) == len(PROMPTS), "those of the stream"
    last = {int(output.request_id): output for output in stream}
    assert tokens([last[index] for index in range(len(PROMPTS))]) == expected == answers(llm)


def test_ctrl_c_in_a_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream(PROMPTS, greedy(20))
    next(stream)
    in_step(llm, 3, ctrl_c, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert not engine_of(llm).has_unfinished
    assert len(answers(llm)) == len(PROMPTS)


def test_interrupts_are_held_back_once() -> None:
    done = []

    def block(*actions: Callable[[], Any]) -> None:
        with deferred_interrupts():
            for action in actions:
                action()
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        block(ctrl_c)
    assert len(done) == 1
    with pytest.raises(KeyboardInterrupt):
        block(ctrl_c, ctrl_c)
    assert len(done) == 1, "what hangs can be left"
    with pytest.raises(KeyboardInterrupt) as told:
        block(ctrl_c, lambda: 1 // 0)
    assert isinstance(told.value.__context__, ZeroDivisionError)


def test_handlers_of_others() -> None:
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with deferred_interrupts():
            ctrl_c()
            assert not caught
        assert caught == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with deferred_interrupts():
            ctrl_c()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def elsewhere() -> None:
        with deferred_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    with ThreadPoolExecutor(1) as pool:
        pool.submit(elsewhere).result()


def test_threads_share_an_llm(llm: LLM) -> None:
    expected = answers(llm)
    before = llm.stats.num_steps

    def call(index: int) -> list[list[int]]:
        if index % 2:
            return answers(llm)
        last = {int(output.request_id): output for output in llm.stream(PROMPTS, greedy(20))}
        return tokens([last[index] for index in range(len(PROMPTS))])

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(call, range(12), timeout=60):
            assert found == expected
    assert llm.stats.num_steps - before < 12 * 20, "calls of several threads are batched together"


def test_nobody_is_passed_by(llm: LLM) -> None:
    """A short call ends while a long one of another thread goes on."""
    begun, ended = threading.Event(), threading.Event()

    def long_call() -> None:
        for output in llm.stream(PROMPTS[0], SamplingParams(max_tokens=1500, ignore_eos=True)):
            begun.set()
            if ended.is_set() and not output.finished:
                return

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(long_call)
        assert begun.wait(20)
        assert len(answers(llm)) == len(PROMPTS)
        assert not call.done()
        ended.set()
        call.result(timeout=20)


def test_streams_in_turns(llm: LLM) -> None:
    """In one thread, with a whole call between two outputs, and one stream that is let go of within a step."""
    expected = answers(llm)
    streams = [llm.stream(prompt, greedy(20)) for prompt in PROMPTS]
    last = [None] * len(PROMPTS)
    while None in last or not all(output.finished for output in last):  # type: ignore[attr-defined]
        for index, stream in enumerate(streams):
            last[index] = next(stream, last[index])  # type: ignore[call-overload]
        assert answers(llm) == expected
    assert tokens(last) == expected  # type: ignore[arg-type]


def test_a_stream_that_is_dropped_in_the_middle_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the garbage collector may do it, in whatever thread is at it."""
    expected = answers(llm)
    streams = [llm.stream(PROMPTS, greedy(20))]
    next(streams[0])
    in_step(llm, 5, streams.clear, monkeypatch)
    assert answers(llm) == expected


def test_a_failed_step_is_told_to_every_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that meets it gets the error itself, and none of the clean-up's."""
    with LLM(dtype="float32", num_kv_blocks=300) as broken:
        engine = engine_of(broken)
        stream = broken.stream(PROMPTS[0], greedy(20))
        next(stream)

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        for part, name in ((engine.scheduler, "update"), (engine.scheduler, "abort"), (engine.executor, "close")):
            monkeypatch.setattr(part, name, fail)
        with pytest.raises(RuntimeError, match="out of memory") as told:
            answers(broken)
        assert told.value.__context__ is None
        with raises_sentence(NanoflowError, "The engine stopped at an earlier error (RuntimeError('out of memory'))"):
            list(stream)
        with raises_sentence(NanoflowError, "The engine stopped at an earlier error (RuntimeError('out of memory'))"):
            answers(broken)
        monkeypatch.undo()


def test_a_fork_gets_a_sentence(llm: LLM) -> None:
    answers(llm)
    streaming = AsyncLLM(num_kv_blocks=100)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        for call in (lambda: llm.generate(PROMPTS), lambda: streaming.generate(PROMPTS[0]), lambda: LLM(device="cpu")):
            try:
                queue.put(call())
            except NanoflowError as error:
                queue.put(str(error))
        llm._end()  # as at the end of an interpreter

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        process = context.Process(target=child)
        process.start()
        told = [queue.get(timeout=30) for _ in range(3)]
        process.join(30)
    finally:
        torch.set_num_threads(before)
    assert process.exitcode == 0
    assert told[0].startswith(f"This LLM was made in process {os.getpid()}, of which this one is a fork")
    assert told[1].startswith(f"This AsyncLLM was made in process {os.getpid()}, of which this one is a fork")
    assert "call torch.set_num_threads(1) in it first" in told[2]
    assert len(answers(llm)) == len(PROMPTS), "and the parent goes on"


def test_a_fork_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LOADED_IN", -1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for is_bad in (False, True):
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda is_bad=is_bad: is_bad)
        if is_bad:
            with raises_sentence(NanoflowError, "This process is a fork of one that used the GPU; start it with"):
                forks.check_can_start("auto")
        else:
            forks.check_can_start("auto")
