"""A request's priority reaches the scheduler by every way in."""

from __future__ import annotations

import asyncio

import pytest

from nanoflow import LLM, AsyncLLM, SamplingParams
from nanoflow.core.config.errors import RequestError

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True, priority=1)
ONE_AT_A_TIME = {"scheduler": "priority", "max_num_seqs": 1, "num_kv_blocks": 8}


@pytest.mark.parametrize(
    ("priority", "expected"), [(None, [0, 1, 2]), (7, [0, 1, 2]), ([5, -1, 3], [1, 2, 0]), ((1, 1, 0), [2, 0, 1])]
)
def test_generate(priority: int | list[int] | None, expected: list[int]) -> None:
    with LLM(**ONE_AT_A_TIME) as llm:
        outputs = llm.generate([[1], [2], [3]], PARAMS, use_tqdm=False, priority=priority)
    ended = [output.metrics.finished_time or 0.0 for output in outputs]
    assert sorted(range(3), key=ended.__getitem__) == expected


def test_one_for_each_prompt() -> None:
    with LLM(**ONE_AT_A_TIME) as llm, pytest.raises(RequestError, match="3 prompts but 2 priorities"):
        llm.generate([[1], [2], [3]], PARAMS, use_tqdm=False, priority=[1, 2])


@pytest.mark.slow
def test_async() -> None:
    async def serve() -> list[int]:
        ended: list[int] = []
        async with AsyncLLM(**ONE_AT_A_TIME) as engine:

            async def follow(number: int, priority: int, max_tokens: int) -> None:
                params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
                async for _ in engine.generate([1 + number], params, priority=priority):
                    pass
                ended.append(number)

            await asyncio.gather(follow(0, 0, 100), follow(1, 5, 2), follow(2, -5, 2))
        return ended

    ended = asyncio.run(serve())
    assert ended.index(2) < ended.index(1)
