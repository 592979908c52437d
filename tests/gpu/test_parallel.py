"""Tensor parallelism over NCCL; each test takes as many GPUs as it has ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

pytest.importorskip("triton")

from nanoflow import LLM, SamplingParams
from nanoflow.core.distributed.process_group import OneShotGroup
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of, tokens
from tests.gpu import sums

SOON = 30  # seconds

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")


def start(oracle: Oracle, size: int, **options: Any) -> LLM:
    """The bundled checkpoint, which has 4 query and 2 KV heads."""
    if size > torch.cuda.device_count():
        pytest.skip(f"there are fewer than {size} GPUs")
    defaults = {"device": "cuda", "dtype": "float32", "num_kv_blocks": 512, "block_size": 16, "max_model_len": 512,
                "max_num_seqs": 8, "max_num_batched_tokens": 48}  # fmt: skip
    return LLM(str(oracle("bard").folder), tensor_parallel_size=size, **{**defaults, **options})


def has_fused_sums(llm: LLM) -> bool:
    """Otherwise they are NCCL's, as they are where GPUs can't share memory."""
    return isinstance(engine_of(llm).executor.runner.rank_group.parallel.group, OneShotGroup)


@pytest.mark.parametrize("size", [2, 4])
def test_sums_fused_with_norms(size: int) -> None:
    """Of all sorts of shapes, one after the other, also in a graph that is replayed."""
    if size > torch.cuda.device_count():
        pytest.skip(f"there are fewer than {size} GPUs")
    store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    processes = [get_context("spawn").Process(target=sums.work, args=(rank, size, store.port)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240  # each of them compiles a kernel for many shapes
    # Where one fails, the others wait for it.
    while time.monotonic() < deadline and all(process.exitcode is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        process.join(SOON)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * size


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"one_shot_kib": 0}, {}])
@pytest.mark.parametrize("size", [2, 4])
def test_greedy_float32_is_exact(oracle: Oracle, size: int, options: dict[str, Any], overlap: bool) -> None:
    with start(oracle, size, overlap=overlap, **options) as llm:
        assert (engine_of(llm).executor.runner.graphs is None) == ("enforce_eager" in options)
        assert has_fused_sums(llm) == (options.get("one_shot_kib") != 0)
        for _ in range(2):  # the second time from the prefix cache
            check(llm, oracle("bard"))
        assert llm.stats.num_hit_tokens > 0


@pytest.mark.parametrize("one_shot_kib", [0, 512])
@pytest.mark.parametrize("size", [2, 4])
def test_preemption(oracle: Oracle, size: int, one_shot_kib: int) -> None:
    longest = max(len(prompt) for prompt in oracle("bard").prompts) + 20
    with start(oracle, size, num_kv_blocks=-(-longest // 16), one_shot_kib=one_shot_kib) as llm:
        check(llm, oracle("bard"))
        assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("size", [2, 4])
def test_sampling_is_that_of_one_gpu(oracle: Oracle, size: int) -> None:
    """Rows that a graph draws, and others that are drawn beside it, in one batch."""
    prompts = oracle("bard").prompts * 2
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 0.0},
    ]
    params = [
        SamplingParams(seed=index, max_tokens=30, ignore_eos=True, **kinds[index % len(kinds)])
        for index in range(len(prompts))
    ]
    drawn = []
    for count in (1, size):
        with start(oracle, count) as llm:
            drawn.append(tokens(llm.generate(prompts, params, use_tqdm=False)))
    assert drawn[1] == drawn[0]


KILL = """
import os, signal
from nanoflow import LLM, SamplingParams
llm = LLM({folder!r}, tensor_parallel_size=2, device="cuda", num_kv_blocks=512, max_model_len=512, one_shot_kib={kib})
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
for number, output in enumerate(llm.stream([[1, 2, 3]], params)):
    if number == 3:
        print("now", flush=True)
        os.kill(llm.engine.executor.runner.rank_group.processes[0].pid, signal.SIGKILL)
"""


@pytest.mark.parametrize("one_shot_kib", [0, 512])
def test_a_killed_rank_ends_the_engine(oracle: Oracle, one_shot_kib: int) -> None:
    """And the program with it, whose GPU waits for a rank that is gone."""
    code = KILL.format(folder=str(oracle("bard").folder), kib=one_shot_kib)
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        killer = threading.Timer(200, program.send_signal, [signal.SIGABRT])  # it writes where it hangs
        killer.start()
        assert program.stdout.readline() == "now\n", program.communicate()[1]
        began = time.monotonic()
        _, errors = program.communicate()
        killer.cancel()
    assert "NanoflowError: Rank 1 of 2 failed" in errors, errors
    assert "SIGKILL" in errors
    assert program.returncode == 1, errors
    assert time.monotonic() - began < SOON, errors


def test_two_engines_side_by_side(oracle: Oracle) -> None:
    with start(oracle, 2) as one, start(oracle, 2) as other:
        assert has_fused_sums(one)
        assert has_fused_sums(other)
        for llm in (one, other, one):
            check(llm, oracle("bard"))


def test_the_cache_fills_what_is_left(oracle: Oracle) -> None:
    """Its size is measured on all ranks while they compute together."""
    with start(oracle, 2, num_kv_blocks=None, gpu_memory_utilization=0.5) as llm:
        check(llm, oracle("bard"))
        assert engine_of(llm).block_manager.num_blocks > 512
