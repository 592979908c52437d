"""`AsyncLLM`: nothing that takes long holds up the event loop, and one that nobody holds or closes leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from nanoflow import AsyncLLM, NanoflowError, RequestOutput, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.errors import RequestError
from tests.core.running import greedy
from tests.core.sentences import raises_sentence

SOON = 20  # seconds
MESSAGES = [{"role": "user", "content": "Hail!"}]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("nanoflow", "grammar"))]


def await_end(of: list[threading.Thread]) -> None:
    deadline = time.monotonic() + SOON
    while any(thread.is_alive() for thread in of):
        assert time.monotonic() < deadline, of
        time.sleep(0.01)


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, request_id: str | None = None) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params, request_id)][-1]


def one_of(words: list[str]) -> SamplingParams:
    return greedy(4, structured_outputs=StructuredOutputsParams(choice=words))


@pytest.mark.parametrize("how", ["dropped", "dropped while it works", "closed"])
def test_nothing_is_left(how: str) -> None:
    before = threads()
    llm = AsyncLLM(num_kv_blocks=200)
    engine = weakref.ref(llm._engine)

    async def use(llm: AsyncLLM) -> None:
        await collect(llm, "HAMLET: " * 800, greedy(2, truncate_prompt_tokens=5))  # in a thread
        await collect(llm, "HAMLET:", one_of(["to be", "not to be"]))
        if how == "dropped while it works":
            await anext(llm.generate("HAMLET:", greedy(1500)))
        if how == "closed":
            await llm.close()

    run(use(llm))
    mine = [thread for thread in threads() if thread not in before]
    assert len(mine) > 2 or how == "closed"
    del llm
    gc.collect()
    await_end(mine)
    gc.collect()
    assert engine() is None, "the model and the KV cache"


SCRIPT = """
import asyncio
from nanoflow import AsyncLLM, SamplingParams
engine = AsyncLLM(num_kv_blocks=200)
async def main():
    async def reader():
        async for _ in engine.generate("HAMLET:", SamplingParams(max_tokens=1500, ignore_eos=True)):
            pass
    task = asyncio.create_task(reader())
    await asyncio.sleep(0.2)
    if HOW == "dropped":
        dropped = AsyncLLM(num_kv_blocks=200)
        dropped._thread.commands.put(dropped._engine.admission.request("0", [1], SamplingParams(max_tokens=1500)))
    if HOW == "an open loop":
        return task
if HOW == "an open loop":
    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(main())
else:
    asyncio.run(main())
print("the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed loop", "an open loop", "dropped"])
def test_the_end_of_a_program_that_closes_nothing(how: str) -> None:
    for _ in range(2):
        script = SCRIPT.replace("HOW", repr(how))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


def test_the_event_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """While prompts are tokenized and rendered and requests are checked, other requests come and go."""

    async def test() -> None:
        async with AsyncLLM(num_kv_blocks=200) as llm:
            engine, held, seen = llm._engine, threading.Event(), []
            assert engine is not None
            assert engine.tokenizer is not None
            compiler = engine.processors.by_name["grammar"].compiler  # type: ignore[attr-defined]

            def hold(name: str, owner: Any) -> None:
                original = getattr(owner, name)

                def wait(*args: Any, **options: Any) -> Any:
                    if threading.current_thread() is not threading.main_thread():
                        seen.append(name)
                        assert held.wait(SOON)
                    return original(*args, **options)

                monkeypatch.setattr(owner, name, wait)

            hold("_encode", engine.tokenizer)
            hold("render_chat", engine.tokenizer)
            hold("check", compiler)
            tasks = [asyncio.create_task(collect(llm, "a " * 40_000, greedy(1))) for _ in range(2)]
            grammar = asyncio.create_task(collect(llm, "HAMLET:", one_of(["to be"])))
            chat = asyncio.create_task(anext(llm.chat(MESSAGES, greedy(4))))
            for _ in range(20):
                assert len((await collect(llm, "HAMLET:", greedy(2)))["token_ids"]) == 2
            deadline = time.monotonic() + SOON
            while len(seen) < 4:
                assert time.monotonic() < deadline, seen
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in (*tasks, grammar, chat))
            held.set()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, RequestError)
            assert (await grammar)["text"] == "to be"
            assert (await chat).prompt == "STRANGER:\nHail!\n\nBARD:\n"

    run(test())


def test_abort_and_cancel_before_the_engine_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with AsyncLLM(num_kv_blocks=200) as llm:
            tokenizer, held = llm._engine.tokenizer, threading.Event()  # type: ignore[union-attr]
            encode = tokenizer._encode

            def wait(*args: Any) -> Any:
                assert held.wait(SOON)
                return encode(*args)

            monkeypatch.setattr(tokenizer, "_encode", wait)
            params = greedy(1500, truncate_prompt_tokens=5)
            aborted = asyncio.create_task(collect(llm, "a " * 3000, params, "aborted"))
            cancelled = asyncio.create_task(collect(llm, "a " * 3000, params, "cancelled"))
            await asyncio.sleep(0.05)
            with raises_sentence(RequestError, "There is an unfinished request 'aborted' already"):
                await collect(llm, [5], params, "aborted")
            abort = asyncio.create_task(llm.abort("aborted"))
            cancelled.cancel()
            await asyncio.sleep(0.05)
            assert not abort.done()
            held.set()
            await abort
            assert (await aborted).outputs[0].finish_reason == "abort"
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled()
            await collect(llm, [5], greedy(2), "cancelled")
            assert not llm._engine.has_unfinished  # type: ignore[union-attr]

    run(test())


def test_close_while_a_prompt_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        llm = AsyncLLM(num_kv_blocks=200)
        tokenizer, held = llm._engine.tokenizer, threading.Event()  # type: ignore[union-attr]
        monkeypatch.setattr(tokenizer, "_encode", lambda *_: held.wait(SOON) and [5])
        tasks = [asyncio.create_task(collect(llm, "a " * 3000, greedy(2))) for _ in range(5)]
        await asyncio.sleep(0.05)
        await llm.close()
        held.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, NanoflowError)
            assert "was closed" in str(result)

    run(test())


def test_a_failure_is_told_before_the_end_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clean-up takes or raises."""

    async def test() -> None:
        llm = AsyncLLM(num_kv_blocks=200)
        engine, held = llm._engine, threading.Event()
        assert engine is not None

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        def slow_failure() -> Any:
            held.wait(SOON)
            raise OSError("the clean-up")

        monkeypatch.setattr(engine.executor, "submit", fail)
        monkeypatch.setattr(engine.executor, "close", slow_failure)
        results = await asyncio.gather(*(collect(llm, [5], greedy(2)) for _ in range(3)), return_exceptions=True)
        held.set()
        for result in results:
            assert isinstance(result, NanoflowError)
            assert str(result.__cause__) == "out of memory"
        monkeypatch.undo()
        await llm.close()

    run(test())
