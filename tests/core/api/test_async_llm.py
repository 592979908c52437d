"""`AsyncLLM`: many streams on one event loop, and what ends them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import (
    LLM,
    AsyncLLM,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    TokensPrompt,
)
from nanoflow.core.config.errors import ConfigError, NanoflowError, RequestError
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.engine import Engine
from tests.core.running import greedy
from tests.core.scripted import byte_level, scripted_config
from tests.core.sentences import raises_sentence

SAYING = "To be, or not to be: naïve 日本語 🎭🎉!"
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@cache
def tokenizer() -> Any:
    return byte_level(merges=False)


@pytest.fixture(params=[False, True], ids=["overlap off", "overlap on"])
def talker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncLLM:
    """It says SAYING over and over, a byte a token."""
    script = tokenizer().encode(SAYING)
    return AsyncLLM.from_config(*scripted_config(tmp_path / "c", script, tokenizer(), overlap=request.param))


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test that hangs fails."""
    asyncio.run(asyncio.wait_for(test, 30))


def says(**params: Any) -> SamplingParams:
    return greedy(**{"max_tokens": len(tokenizer().encode(SAYING))} | params)


def engine_below(llm: AsyncLLM) -> Engine:
    assert llm._engine is not None
    return llm._engine


async def collect(llm: AsyncLLM, params: SamplingParams, request_id: str | None = None) -> list[RequestOutput]:
    return [output async for output in llm.generate([1], params, request_id)]


async def blocks_are_free(llm: AsyncLLM) -> None:
    """All that was submitted has been done, and no request is left."""
    engine = engine_below(llm)
    while engine.has_unfinished or not llm._thread.commands.empty():
        await asyncio.sleep(0.001)
    assert not engine.has_unfinished
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def test_cumulative(talker: AsyncLLM) -> None:
    async def test() -> None:
        async with talker:
            outputs = await collect(talker, says(), "mine")
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert {output.request_id for output in outputs} == {"mine"}
        assert all(SAYING.startswith(output["text"]) for output in outputs)
        assert outputs[-1]["text"] == SAYING

    run(test())


def test_delta_and_final_only(talker: AsyncLLM) -> None:
    async def test() -> None:
        async with talker:
            deltas = await collect(talker, says(output_kind=DELTA))
            assert [i for output in deltas for i in output["token_ids"]] == tokenizer().encode(SAYING)
            assert "".join(output["text"] for output in deltas) == SAYING
            (final,) = await collect(talker, says(output_kind=FINAL_ONLY))
            assert final["text"] == SAYING

    run(test())


@pytest.mark.slow
def test_many_streams_give_what_generate_gives(tmp_path: Path) -> None:
    params = [
        SamplingParams(temperature=3.0, seed=i, max_tokens=5 + i % 30, n=1 + i % 3, stop=["a", "bc"], output_kind=kind)
        for i in range(60) for kind in RequestOutputKind
    ]  # fmt: skip
    config = scripted_config(tmp_path, tokenizer().encode(SAYING), tokenizer(), num_kv_blocks=64)
    with LLM.from_config(*config) as llm:
        expected = llm.generate([[1]] * len(params), params, use_tqdm=False)

    async def test() -> None:
        async with AsyncLLM.from_config(*config) as llm:
            results = await asyncio.gather(*(collect(llm, param) for param in params))
            await blocks_are_free(llm)
        for param, outputs, right in zip(params, results, expected, strict=True):
            assert outputs[-1].finished
            texts = [""] * param.n
            for completion in (completion for output in outputs for completion in output.outputs):
                old = texts[completion.index] if param.output_kind is DELTA else ""
                texts[completion.index] = old + completion.text
            assert texts == [completion.text for completion in right.outputs]

    run(test())


@pytest.mark.parametrize("way", ["cancel the task", "close the generator", "by id"])
def test_abort(talker: AsyncLLM, way: str) -> None:
    """Blocks are free before the next step, and others go on."""

    async def test() -> None:
        async with talker:
            other = asyncio.create_task(collect(talker, says(max_tokens=200)))
            last: list[RequestOutput] = []

            async def read() -> None:
                async for output in talker.generate([1], says(max_tokens=None), "mine"):
                    last[:] = [output]

            if way == "close the generator":
                stream = talker.generate([1], says(max_tokens=None), "mine")
                await anext(stream)
                await stream.aclose()
            else:
                task = asyncio.create_task(read())
                while not last:
                    await asyncio.sleep(0.001)
                if way == "by id":
                    await talker.abort("mine")
                    await talker.abort("mine")
                    await task
                    assert last[0].finished
                    assert last[0].outputs[0].finish_reason == "abort"
                else:
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            while not talker._thread.commands.empty():  # what was submitted before was done before
                await asyncio.sleep(0.001)
            unfinished = list(engine_below(talker).requests)
            assert len((await other)[-1]["token_ids"]) == 200
            assert len(unfinished) <= 1
            await blocks_are_free(talker)
            assert (await collect(talker, says(), "mine"))[-1]["text"] == SAYING  # the id is free again

    run(test())


def test_an_id_is_reused_at_once(talker: AsyncLLM) -> None:
    """What is on its way for the old request never reaches the new one."""

    async def test() -> None:
        async with talker:
            for count in range(1, 6):
                stream = talker.generate([1], says(max_tokens=None), "mine")
                await anext(stream)
                await stream.aclose()
                outputs = await collect(talker, says(max_tokens=count, output_kind=DELTA), "mine")
                assert sum(len(output["token_ids"]) for output in outputs) == count

    run(test())


def test_an_id_is_free_when_its_request_has_ended(talker: AsyncLLM) -> None:
    """Whoever has read the last output need not close the generator."""

    async def test() -> None:
        async with talker:
            ended = []
            for _ in range(3):
                ended.append(stream := talker.generate([1], says(), "mine"))
                while not (await anext(stream)).finished:
                    pass
            assert len(ended) == 3

    run(test())


def test_mistakes_harm_nobody_else(talker: AsyncLLM) -> None:
    async def test() -> None:
        async with talker:
            stream = talker.generate([1], says(), "mine")
            await anext(stream)
            with raises_sentence(RequestError, "There is an unfinished request 'mine' already"):
                await collect(talker, says(), "mine")
            with raises_sentence(RequestError, "The prompt is empty"):
                await anext(talker.generate([], says()))
            with raises_sentence(RequestError, "Prompt 0 must be a text"):
                talker.generate(None, says())
            with raises_sentence(RequestError, "no chat template"):
                await anext(talker.chat([{"role": "user", "content": "hi"}]))
            with raises_sentence(RequestError, "sampling_params must be a SamplingParams, got {'n': 2}"):
                talker.generate([1], {"n": 2})  # type: ignore[arg-type]
            await talker.abort("nobody")
            assert [output async for output in stream][-1]["text"] == SAYING

    run(test())


def test_a_request_that_cannot_be_added_harms_nobody(talker: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever adding it raises, when `check_request` has found nothing."""

    async def test() -> None:
        async with talker:
            good = asyncio.create_task(collect(talker, says()))
            engine = engine_below(talker)
            add = engine.scheduler.add

            def refuse_the_last_of_three(sequence: Sequence) -> None:
                if sequence.request_id.endswith("#2"):
                    raise TypeError("what\nis that?")
                add(sequence)

            monkeypatch.setattr(engine.scheduler, "add", refuse_the_last_of_three)
            with raises_sentence(RequestError, "The request can't be served (TypeError: what is that?)"):
                await collect(talker, says(n=3), "bad")
            with raises_sentence(RequestError, "The bad word '\\ud800' is not valid Unicode"):
                await collect(talker, says(bad_words=["\ud800"]))
            assert (await good)[-1]["text"] == SAYING
            assert (await collect(talker, says(), "bad"))[-1]["text"] == SAYING
            await blocks_are_free(talker)

    run(test())


def test_a_grammar_that_breaks_harms_nobody(talker: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with talker:
            grammars = engine_below(talker).processors.by_name["grammar"].compiler
            monkeypatch.setattr(grammars, "check", lambda _: None)
            monkeypatch.setattr(grammars, "matcher", lambda _: 1 / 0)
            good = asyncio.create_task(collect(talker, says()))
            (output,) = await collect(talker, says(structured_outputs=StructuredOutputsParams(regex="a")))
            assert output.outputs[0].finish_reason == "error"
            assert output.outputs[0].stop_reason == "The grammar can't be used (ZeroDivisionError: division by zero)."
            assert (await good)[-1]["text"] == SAYING
            await blocks_are_free(talker)

    run(test())


@pytest.mark.parametrize("where", ["executor", "output processor"])
def test_a_failure_reaches_every_waiter(talker: AsyncLLM, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        tasks = [asyncio.create_task(collect(talker, says(max_tokens=None))) for _ in range(5)]
        await asyncio.sleep(0.02)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

        engine = engine_below(talker)
        if where == "executor":
            monkeypatch.setattr(engine.executor, "submit", fail)
        else:
            monkeypatch.setattr(engine.output_processor, "_texts", fail)
        tasks += [asyncio.create_task(collect(talker, says(max_tokens=None))) for _ in range(5)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, NanoflowError)
            assert isinstance(result.__cause__, RuntimeError)
        with raises_sentence(NanoflowError, "The engine stopped at an error (RuntimeError('out of memory')); make"):
            await collect(talker, says())
        await talker.close()
        await talker.close()

    run(test())


def test_close_ends_what_is_pending(talker: AsyncLLM) -> None:
    async def test() -> None:
        tasks = [asyncio.create_task(collect(talker, says(max_tokens=None))) for _ in range(5)]
        await asyncio.sleep(0.02)
        late = asyncio.create_task(collect(talker, says(max_tokens=None)))
        await asyncio.sleep(0)
        await talker.close()
        for outputs in await asyncio.gather(*tasks, late):
            assert outputs[-1].outputs[0].finish_reason == "abort"
        with raises_sentence(NanoflowError, "This AsyncLLM was closed; make a new one."):
            await collect(talker, says())
        assert not any(thread.is_alive() for thread in talker._thread.threads)
        await talker.close()

    run(test())


def test_one_event_loop_after_the_other(talker: AsyncLLM) -> None:
    """A loop that ends takes its streams along."""

    async def leave() -> None:
        await anext(talker.generate([1], says(max_tokens=None)))

    async def test() -> None:
        assert (await collect(talker, says()))[-1]["text"] == SAYING
        await blocks_are_free(talker)

    run(leave())
    run(test())
    run(test())
    asyncio.run(talker.close())


def test_text_does_not_hold_up_the_step_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 streams, the thread that steps decodes nothing, and steps go on while text waits."""
    config = scripted_config(
        tmp_path, tokenizer().encode(SAYING), tokenizer(), num_kv_blocks=2000, scheduler={"max_num_seqs": 256}
    )
    num_tokens = 32

    async def test() -> None:
        async with AsyncLLM.from_config(*config) as llm:
            engine, held = engine_below(llm), threading.Event()
            decode_all, threads = engine.tokenizer.decode_all, set()

            def watch(*args: Any, **options: Any) -> list[str]:
                threads.add(threading.current_thread().name)
                held.wait(10)
                return decode_all(*args, **options)

            monkeypatch.setattr(engine.tokenizer, "decode_all", watch)
            tasks = [asyncio.create_task(collect(llm, says(max_tokens=num_tokens))) for _ in range(256)]
            deadline = time.monotonic() + 20
            while engine.stats.num_output_tokens < 256 * num_tokens:  # though no text has been decoded
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            held.set()
            for outputs in await asyncio.gather(*tasks):
                assert outputs[-1]["text"] == SAYING.encode()[:num_tokens].decode(errors="replace")
            assert threads == {"nanoflow-outputs"}

    run(test())


def test_default_parameters_and_stats() -> None:
    async def test() -> None:
        async with AsyncLLM(max_num_seqs=4) as llm:
            outputs = [output async for output in llm.generate("HAMLET:")]
            assert len(outputs[-1]["token_ids"]) == 16
            assert llm.stats.num_output_tokens == 16
            assert llm.describe()["model"] == "qwen3"
            answer = [o async for o in llm.chat([{"role": "user", "content": "Hail!"}], greedy(4))]
            assert answer[-1].prompt == "STRANGER:\nHail!\n\nBARD:\n"

    run(test())


def test_arguments_of_a_wrong_type(talker: AsyncLLM) -> None:
    async def test() -> None:
        async with talker:
            for params in ({"temperature": 1}, "x", [says()]):
                with raises_sentence(RequestError, "sampling_params must be a SamplingParams, got "):
                    talker.generate([1], params)
                with raises_sentence(RequestError, "sampling_params must be a SamplingParams, got "):
                    talker.chat([{"role": "user", "content": "a"}], params)
            for request_id in (["a"], 5, {}):
                with raises_sentence(RequestError, "request_id must be a text, got "):
                    talker.generate([1], says(), request_id)
                with raises_sentence(RequestError, "request_id must be a text, got "):
                    await talker.abort(request_id)
            for priority in ("x", 1.5, [1]):
                with raises_sentence(ConfigError, "priority must be an integer, got "):
                    talker.generate([1], says(), priority=priority)
            assert (await talker.get_tokenizer()).encode("a")
            assert (await collect(talker, says()))[-1]["text"] == SAYING

    run(test())


def test_prompts_of_other_libraries(talker: AsyncLLM) -> None:
    async def test() -> None:
        async with talker:
            for prompt in (np.array([1, 2]), TokensPrompt(prompt_token_ids=[1, 2]), {"input_ids": [[1, 2]]}):
                outputs = [output async for output in talker.generate(prompt, greedy(1))]
                assert outputs[-1].prompt_token_ids == [1, 2]
            with raises_sentence(RequestError, "but the tokenizer was given 2 texts for it"):
                talker.generate({"input_ids": [[1], [2]]}, greedy(1))

    run(test())
