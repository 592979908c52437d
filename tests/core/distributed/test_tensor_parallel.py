"""Several ranks on the CPU give the very tokens of one, and end together when one of them does."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import LLM, AsyncLLM, SamplingParams
from nanoflow.core.config.errors import CheckpointError, ConfigError, NanoflowError
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import Driver, Worker
from nanoflow.core.execution.step_buffer import StepBuffer
from nanoflow.core.execution.step_message import StepMessage
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of, greedy, recorded, tokens
from tests.core.sentences import raises_sentence

SOON = 20  # seconds, on a machine that has other things to do


def start(oracle: Oracle, size: int = 2, name: str = "plain", **options: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "block_size": 4, "num_kv_blocks": 256, "max_num_seqs": 8}
    return LLM(str(oracle(name).folder), tensor_parallel_size=size, **{**defaults, **options})


@pytest.fixture(scope="module")
def pair(oracle: Oracle) -> Iterator[LLM]:
    """Two ranks with overlap, small chunks, and blocks for hardly more than the longest prompt."""
    with start(oracle, overlap=True, max_num_batched_tokens=24, num_kv_blocks=30) as llm:
        yield llm


def pids(llm: LLM) -> list[int]:
    rank_group = engine_of(llm).executor.runner.rank_group
    assert isinstance(rank_group, Driver)
    return [process.pid for process in rank_group.processes]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + SOON
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.05)


@pytest.mark.slow
def test_chunks_preemption_and_overlap(oracle: Oracle, pair: LLM) -> None:
    check(pair, oracle("plain"))
    assert pair.stats.num_preemptions > 0
    check(pair, oracle("plain"), order=[12, 12, 13])
    assert pair.stats.num_hit_tokens > 0
    assert pair.describe()["device"].startswith("2 x cpu")


def test_nobody_can_connect(pair: LLM) -> None:
    """Ranks of one host have no port, and their folder is their user's alone."""
    assert [address for pid in (os.getpid(), *pids(pair)) for address in listening(pid)] == []
    rank_group = engine_of(pair).executor.runner.rank_group
    (folder,) = {Path(rank_group.store.path).parent}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def listening(pid: int) -> list[str]:
    """Addresses, in hexadecimal, at which a process waits for connections."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(fd).removeprefix("socket:[").rstrip("]"))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def test_sampling_is_that_of_one_rank(oracle: Oracle, pair: LLM) -> None:
    """Seeds, filters, penalties and log-probabilities, side by side with greedy rows and with another engine."""
    prompts = oracle("plain").prompts[4:9]
    params = [
        greedy(),
        SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=6, max_tokens=12, ignore_eos=True, top_k=9, top_p=0.9, min_p=0.01),
        greedy(12, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}),
        greedy(12, logprobs=3, prompt_logprobs=2),
    ]
    with start(oracle, size=1) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
        outputs = pair.generate(prompts, params, use_tqdm=False)
        scores = [llm.score(prompts, prompts[::-1], use_tqdm=False) for llm in (pair, alone)]
    assert tokens(outputs) == tokens(expected)
    for score, other in zip(*scores, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    for ours, theirs in ((outputs[4].prompt_logprobs, expected[4].prompt_logprobs),
                         (outputs[4].outputs[0].logprobs, expected[4].outputs[0].logprobs)):  # fmt: skip
        assert [entry and entry.keys() for entry in ours] == [entry and entry.keys() for entry in theirs]
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert [lp.logprob for lp in one.values()] == pytest.approx([lp.logprob for lp in other.values()], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(4, "bias"), (2, "sharded_tied")])
def test_shared_kv_heads_biases_and_tied_heads(oracle: Oracle, size: int, name: str) -> None:
    """Four ranks share the two KV heads of "bias"; the other checkpoint has several files."""
    with start(oracle, size, name, overlap=False) as llm:
        for _ in range(2):
            check(llm, oracle(name))
        assert llm.stats.num_hit_tokens > 0
        ended = pids(llm)
    assert not any(map(is_running, ended))


@pytest.mark.slow
def test_a_killed_rank_ends_the_engine(oracle: Oracle) -> None:
    llm = start(oracle, size=2)
    (pid,) = pids(llm)
    with recorded(llm) as batches, raises_sentence(NanoflowError, "Rank 1 of 2 failed", "SIGKILL"):
        for number, _ in enumerate(llm.stream([[1, 2, 3]], greedy(200))):
            if number == 3:
                os.kill(pid, signal.SIGKILL)
                began = time.monotonic()
    assert time.monotonic() - began < SOON
    assert batches
    with pytest.raises(NanoflowError, match="SIGKILL"):
        llm.generate([[1, 2, 3]], greedy(), use_tqdm=False)
    llm.close()


@pytest.mark.slow
def test_an_engine_that_nobody_has_any_more_ends_its_ranks(oracle: Oracle) -> None:
    llm = start(oracle)
    ended = pids(llm)
    del llm
    gc.collect()
    await_end(ended)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_engine(oracle: Oracle) -> None:
    with start(oracle) as llm:
        ended = pids(llm)
        rank_group = engine_of(llm).executor.runner.rank_group
        assert isinstance(rank_group, Driver)
        rank_group.send(np.zeros(8, np.uint8))  # no step
        with raises_sentence(NanoflowError, "Rank 1 of 2 failed, and the engine with it: ValueError: "):
            llm.generate([[1, 2, 3]], greedy(), use_tqdm=False)
        await_end(ended)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "change", "error", "words"),
    [
        (3, None, ConfigError, "the model's 128 tokens of the vocabulary can't be split evenly"),
        (2, "model.safetensors", CheckpointError, "no *.safetensors files"),
    ],
)
def test_what_no_rank_can_build(
    size: int, change: str | None, error: type[NanoflowError], words: str, oracle: Oracle, tmp_path: Path
) -> None:
    folder = oracle("plain").folder
    for file in folder.iterdir():
        if file.name != change:
            (tmp_path / file.name).symlink_to(file)
    with raises_sentence(error, words):
        LLM(str(tmp_path), device="cpu", tensor_parallel_size=size, num_kv_blocks=8)


@pytest.fixture
def channel() -> tuple[Driver, list[Worker]]:
    """Three ranks in one process, which have no group."""
    ends = [Pipe() for _ in range(2)]
    driver = Driver(None, [ours for ours, _ in ends], [])  # type: ignore[arg-type]
    return driver, [Worker(ParallelContext(rank, 3), None, end) for rank, (_, end) in enumerate(ends, 1)]  # type: ignore[arg-type]


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_no_batch_is_too_large_for_the_channel(channel: tuple[Driver, list[Worker]]) -> None:
    """300 requests of 3,840 tokens: 28 MB, of which nothing is lost."""
    driver, workers = channel
    num_tokens, num_blocks = 300 * 3840, 300 * 240
    step = StepBuffer(num_tokens, 300, torch.device("cpu"))
    step.memory.copy_(torch.randint(256, (len(step.memory),), dtype=torch.uint8))
    changes, params = np.arange(2 * num_blocks).reshape(2, -1), np.arange(903).reshape(3, -1)
    work = StepMessage(step, False, False, True, 17, np.arange(5), changes, params)
    thread = beside(lambda: driver.send(work.pack()))
    for worker in workers:
        got = StepMessage.unpack(worker.receive(), lambda T, S, captured: StepBuffer(T, S, torch.device("cpu")))
        assert torch.equal(got.buffer.memory, step.memory)
        assert (got.buffer.num_tokens, got.buffer.num_seqs, got.num_decodes) == (num_tokens, 300, 17)
        assert (got.uniform_decode, got.captured, got.temperature_only) == (False, False, True)
        for name in ("scored_L", "tables_2C", "params_3C"):
            assert np.array_equal(getattr(got, name), getattr(work, name))
    thread.join(SOON)


def test_the_least_number_of_all_ranks(channel: tuple[Driver, list[Worker]]) -> None:
    driver, workers = channel
    least: list[int] = []
    driver.check()
    threads = [beside(lambda f=f, n=n: least.append(f.minimum(n))) for f, n in zip(workers, (7, 30), strict=True)]
    time.sleep(0.1)
    driver.check()  # theirs have come, which is no failure
    assert driver.minimum(20) == 7
    for thread in threads:
        thread.join(SOON)
    assert least == [7, 7]


def test_the_first_to_fail_is_named(channel: tuple[Driver, list[Worker]]) -> None:
    driver, (first, second) = channel
    second.report(MemoryError("no room for\na shard"))
    first.report(RuntimeError("connection closed by peer"))
    with raises_sentence(
        NanoflowError, "Rank 2 of 3 failed, and the engine with it: MemoryError: no room for a shard."
    ):
        driver.barrier()


def test_a_rank_that_was_killed_comes_before_those_that_complain(channel: tuple[Driver, list[Worker]]) -> None:
    driver, (first, second) = channel
    first.report(RuntimeError("connection closed by peer"))
    second.link.close()
    with raises_sentence(NanoflowError, "Rank 2 of 3 failed, and the engine with it: its process is gone."):
        driver.check()


PROGRAM = """
from nanoflow import LLM, AsyncLLM, SamplingParams
llm = LLM({folder!r}, tensor_parallel_size=2, device="cpu", num_kv_blocks=256, block_size=4)
print(*[process.pid for process in llm.engine.executor.runner.rank_group.processes], flush=True)
for output in llm.stream([[1, 2, 3]] * 8, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)):
    print(*output["token_ids"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_interrupted_program(how: signal.Signals, oracle: Oracle) -> None:
    """Ctrl-C goes to all processes of a terminal, a kill to the program alone."""
    command = [sys.executable, "-c", PROGRAM.format(folder=str(oracle("plain").folder))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        assert program.stdout is not None
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert workers
        assert all(map(is_running, workers))
        program.stdout.readline()
        (os.killpg if how == signal.SIGINT else os.kill)(program.pid, how)
        program.stdout.close()
        assert program.wait(SOON) != 0
    await_end(workers)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_with_rank_0() -> None:
    """Even if there are messages that it has not read."""
    code = """
import sys, threading, time
from multiprocessing.connection import Connection
from nanoflow.core.engine.worker import end_with_rank_0
link = Connection(int(sys.argv[1]))
threading.Thread(target=end_with_rank_0, args=(link,), daemon=True).start()
print("ready", flush=True)
time.sleep(100)
"""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", code, str(theirs.fileno())]
    with theirs, subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]) as process:
        assert process.stdout is not None
        theirs.close()
        ours.sendall(b"a step")
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        ours.close()
        assert process.wait(SOON) == 0


@pytest.mark.slow
def test_the_same_program_under_torchrun(oracle: Oracle, tmp_path: Path) -> None:
    """Rank 0 runs the program; the other one serves it, and ends with it."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(folder=str(oracle("plain").folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outputs = [[int(token) for token in line.split()] for line in result.stdout.splitlines()]
    with start(oracle, size=1) as alone:
        (expected,) = tokens(alone.generate([[1, 2, 3]], greedy(200), use_tqdm=False))
    assert outputs.count(expected) == 8


@pytest.mark.slow
def test_async_engine(oracle: Oracle) -> None:
    reference = oracle("plain")

    async def answer() -> tuple[list[list[int]], list[int]]:
        options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4, "num_kv_blocks": 256}
        async with AsyncLLM(str(reference.folder), tensor_parallel_size=2, **options) as llm:
            assert llm._engine is not None
            ended = [process.pid for process in llm._engine.executor.runner.rank_group.processes]  # type: ignore[attr-defined]

            async def read(prompt: list[int]) -> list[int]:
                return [output["token_ids"] async for output in llm.generate(prompt, greedy())][-1]

            found = await asyncio.gather(*map(read, reference.prompts[:4]))
        return found, ended

    found, ended = asyncio.run(answer())
    assert found == reference.outputs[:4]
    assert not any(map(is_running, ended))


@pytest.mark.slow
def test_the_command_line() -> None:
    command = [sys.executable, "-m", "nanoflow", "run", "engine.tensor_parallel_size=2", "engine.device=cpu"]
    command += ["prompts=[HAMLET:]", "sampling.max_tokens=3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout + result.stderr
