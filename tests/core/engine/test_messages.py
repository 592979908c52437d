"""What goes into an engine and what comes out of it is plain data: a whole engine's traffic goes through bytes."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest

from nanoflow import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanoflow.core.config.errors import RequestError
from nanoflow.core.data.messages import AbortRequest, AddRequest, Refusal, Stop, Update, merged
from nanoflow.core.engine import engine_thread
from nanoflow.core.engine.output_processor import OutputProcessor
from tests.core.running import engine_of, greedy
from tests.core.scripted import byte_level, scripted_config, scripted_llm
from tests.core.sentences import raises_sentence

SAYING = "To be, or not to be: naïve 日本語 🎭🎉!"
KINDS = {kind.__name__: kind for kind in (AddRequest, AbortRequest, Stop, Update, Refusal, RequestOutput)}
DELTA = RequestOutputKind.DELTA


@cache
def hf() -> Any:
    return byte_level(merges=True)


def to_bytes(message: Any) -> bytes:
    """The message's kind and its fields."""
    return msgspec.msgpack.encode((type(message).__name__, message))


def from_bytes(data: bytes) -> Any:
    kind, fields = msgspec.msgpack.decode(data, type=tuple[str, msgspec.Raw])
    return msgspec.msgpack.decode(fields, type=KINDS[kind])


def through_bytes(message: Any) -> Any:
    return from_bytes(to_bytes(message))


def random_params(rng: random.Random) -> SamplingParams:
    """Any mix of what a request can ask for."""
    stop = rng.choice([None, None, ["be"], ["naï", " not"], ["never said"]])
    params: dict[str, Any] = {
        "n": rng.choice([1, 1, 1, 2, 3]), "temperature": rng.choice([0, 1.0, 8.0]), "max_tokens": rng.randint(1, 30),
        "stop": stop, "output_kind": rng.choice(list(RequestOutputKind)), "logprobs": rng.choice([None, None, 0, 2]),
        "seed": rng.choice([None, rng.getrandbits(80), -1]), "prompt_logprobs": rng.choice([None, None, 1]),
        "include_stop_str_in_output": rng.random() < 0.3, "skip_special_tokens": rng.random() < 0.7,
        "logit_bias": rng.choice([None, {7: 3.5, 300: -2}]), "detokenize": stop is not None or rng.random() < 0.8,
        "min_tokens": rng.choice([0, 0, 1]), "stop_token_ids": rng.choice([None, [5, 9]]),
        "priority": rng.choice([0, 10**30]), "top_k": rng.choice([0, 2**70]), "cache_salt": rng.choice([None, "é"]),
        "truncate_prompt_tokens": rng.choice([None, 10**40, 3]), "bad_words": rng.choice([None, ["or"]]),
    }  # fmt: skip
    if rng.random() < 0.1:
        broken = {"type": "object", "properties": {"a": {"const": rng.randint(1, 3)}}, "required": ["a"]}
        params["structured_outputs"] = StructuredOutputsParams(json=broken)
    return SamplingParams(**params)


def plain(output: RequestOutput) -> dict[str, Any]:
    """All of an output but its times."""
    fields = msgspec.to_builtins(output)
    for name in ("arrival_time", "first_token_time", "finished_time"):
        fields["metrics"][name] = fields["metrics"][name] is not None
    return fields


def run(llm: LLM, requests: list[AddRequest], *, as_bytes: bool) -> list[dict[str, Any]]:
    """Outputs of requests that come over time, some of which are aborted; twice the same ones in the same order."""
    engine, rng = engine_of(llm), random.Random(1)
    send = through_bytes if as_bytes else lambda message: message
    processor, queue, live = OutputProcessor(engine.tokenizer), list(requests), []
    outputs = []
    while queue or engine.has_unfinished:
        updates = []
        while queue and rng.random() < 0.6:
            request = queue.pop(0)
            processor.add(through_bytes(request) if as_bytes else request)
            live.append(request.request_id)
            updates += engine.handle(send(request))
        if live and rng.random() < 0.1:
            updates += engine.handle(send(AbortRequest(rng.choice(live))))
        for _ in range(rng.choice([1, 1, 3])):
            updates += engine.advance()
        outputs += [plain(send(output)) for output in processor.process([send(u) for u in merged(updates)])]
    assert processor.requests == {}
    return outputs


@pytest.mark.parametrize("overlap", [False, True])
def test_a_whole_engines_traffic_through_bytes(tmp_path: Path, overlap: bool) -> None:
    script, rng = hf().encode(SAYING), random.Random(0)
    options = {"overlap": overlap, "num_kv_blocks": 60, "block_size": 4, "eos": 11, "scheduler": {"max_num_seqs": 8}}
    results: list[list[dict[str, Any]]] = []
    wanted = [(random_params(rng), [1 + i % 5] * rng.randint(1, 9)) for i in range(200)]
    for as_bytes in (False, True):
        with scripted_llm(tmp_path, script, hf(), **options) as llm:
            engine = engine_of(llm)
            grammars = engine.processors.by_name["grammar"].compiler
            compile_later = grammars.submit
            grammars.submit = lambda params: finished(compile_later(params))  # noqa: B023
            requests = [
                engine.admission.request(str(i), token_ids, params, "said" if i % 2 else None, params.output_kind)
                for i, (params, token_ids) in enumerate(wanted)
            ]
            assert [through_bytes(request) for request in requests] == requests
            results.append(run(llm, requests, as_bytes=as_bytes))
    assert results[0] == results[1]
    ends = {completion["finish_reason"] for output in results[0] for completion in output["outputs"]}
    assert ends >= {None, "stop", "length", "abort"}
    assert any(completion["cumulative_logprob"] for output in results[0] for completion in output["outputs"])
    assert {output["request_id"] for output in results[0] if output["finished"]} == {str(i) for i in range(200)}


def finished(future: Future[Any]) -> Future[Any]:
    """The same, once it is done: at which step that is must not depend on the machine."""
    future.exception()
    return future


class BytesQueue(SimpleQueue):
    """A queue that holds bytes alone, as a pipe between two processes does."""

    def put(self, item: Any) -> None:  # type: ignore[override]
        if isinstance(item, list):
            super().put([to_bytes(message) for message in item])
        else:
            super().put(None if item is None else to_bytes(item))

    def get(self, block: bool = True) -> Any:  # type: ignore[override]
        item = super().get(block)
        return [from_bytes(data) for data in item] if isinstance(item, list) else item and from_bytes(item)


def test_an_async_engine_between_two_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, refusals and aborts, and what `generate` gives."""
    monkeypatch.setattr(engine_thread, "SimpleQueue", BytesQueue)
    rng = random.Random(2)
    params = [SamplingParams(temperature=3.0, seed=i, max_tokens=5 + i % 20, n=1 + i % 3, stop=["a", "be"],
                             logprobs=rng.choice([None, 1]), output_kind=kind)
              for i in range(20) for kind in RequestOutputKind]  # fmt: skip
    config = scripted_config(tmp_path, hf().encode(SAYING), hf(), num_kv_blocks=64)
    with LLM.from_config(*config) as llm:
        expected = [plain(output) for output in llm.generate([[1]] * len(params), params, use_tqdm=False)]

    async def collect(llm: AsyncLLM, params: SamplingParams) -> list[RequestOutput]:
        return [output async for output in llm.generate([1], params)]

    async def test() -> None:
        async with AsyncLLM.from_config(*config) as llm:
            held = asyncio.create_task(collect(llm, greedy(max_tokens=None)))
            results = await asyncio.gather(*(collect(llm, param) for param in params))
            for param, outputs, right in zip(params, results, expected, strict=True):
                if param.output_kind is not DELTA:
                    assert plain(outputs[-1])["outputs"] == right["outputs"]
                texts = [""] * param.n
                for completion in (completion for output in outputs for completion in output.outputs):
                    texts[completion.index] = texts[completion.index] * (param.output_kind is DELTA) + completion.text
                assert texts == [completion["text"] for completion in right["outputs"]]
            engine = llm._engine
            assert engine is not None
            monkeypatch.setattr(engine.scheduler, "add", lambda _: 1 / 0)
            with raises_sentence(RequestError, "The request can't be served (ZeroDivisionError: division by zero)"):
                await collect(llm, greedy())
            held.cancel()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_numbers_of_any_size_have_at_most_64_bits_in_a_message(tmp_path: Path) -> None:
    """And the seeds of all completions are those of the whole number."""
    with scripted_llm(tmp_path, [5], vocab_size=9) as llm:
        admission = engine_of(llm).admission
        huge = SamplingParams(seed=3 + 2**70, n=2, priority=-(10**30), max_tokens=10**30, logprobs=10**30)
        request = through_bytes(admission.request("a", [1], huge))
        assert request.params.priority == -(2**63)
        assert (request.params.seed, request.max_tokens) == (3, 511)
        small = admission.request("a", [1], SamplingParams(seed=3, n=2))
        assert request.seeds is not None
        assert small.seeds is not None
        assert request.seeds[0] == small.seeds[0] == 3
        assert request.seeds[1] != small.seeds[1]
