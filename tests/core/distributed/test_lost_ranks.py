"""What becomes of an engine whose ranks are stopped, are killed or go silent: who is named, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.distributed import processes
from nanoflow.core.distributed.processes import StoppedProcesses
from tests.core.checkpoints import Oracle
from tests.core.distributed.test_tensor_parallel import PROGRAM, SOON, await_end, pids, start
from tests.core.running import greedy
from tests.core.sentences import raises_sentence


@contextmanager
def signalled(pid: int, seconds: float, what: signal.Signals) -> Iterator[None]:
    """A process gets a signal after a while."""
    timer = threading.Timer(seconds, os.kill, (pid, what))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.slow
def test_a_stopped_rank_is_named(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 3.0)
    llm = start(oracle)
    (pid,) = pids(llm)
    began = time.monotonic()
    with raises_sentence(NanoflowError, "Rank 1 of 2 failed", f"process {pid} is stopped"):
        for number, _ in enumerate(llm.stream([[1, 2, 3]], greedy(200))):
            if number == 3:
                os.kill(pid, signal.SIGSTOP)
    assert time.monotonic() - began < SOON
    assert f"rank 1 is stopped; `kill -CONT {pid}`" in caplog.text
    llm.close()
    await_end([pid])


@pytest.mark.slow
def test_a_rank_that_goes_on_has_lost_nothing(oracle: Oracle) -> None:
    with start(oracle) as llm:
        (pid,) = pids(llm)
        expected = llm.generate([[1, 2, 3]], greedy(50), use_tqdm=False)[0].outputs[0].token_ids
        os.kill(pid, signal.SIGSTOP)
        with signalled(pid, 2.0, signal.SIGCONT):
            assert llm.generate([[1, 2, 3]], greedy(50), use_tqdm=False)[0].outputs[0].token_ids == expected


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_for_a_stopped_rank(oracle: Oracle) -> None:
    llm = start(oracle)
    (pid,) = pids(llm)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with signalled(os.getpid(), 0.5, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]], greedy(), use_tqdm=False)
    assert time.monotonic() - began < 5
    llm.close()
    await_end([pid])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_rank_ends_with_rank_0(how: signal.Signals, oracle: Oracle, tmp_path: Path) -> None:
    """And the ranks' folder with them."""
    command = [sys.executable, "-c", PROGRAM.format(folder=str(oracle("plain").folder))]
    options: dict[str, Any] = {"start_new_session": True, "env": os.environ | {"TMPDIR": str(tmp_path)}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.stdout.readline()
        assert list(tmp_path.glob("nanoflow-*"))
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(how)
        process.stdout.close()
        assert process.wait(SOON) == -how
    await_end(workers)
    assert list(tmp_path.glob("nanoflow-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_other_ranks_end_quietly(victim: int, oracle: Oracle) -> None:
    """Nothing stands beside the one sentence, or where rank 0 is ended, nothing at all."""
    code = f"""
import os, sys
from nanoflow import LLM, SamplingParams
from nanoflow.core.config.errors import NanoflowError
llm = LLM({str(oracle("bias").folder)!r}, tensor_parallel_size=4, device="cpu", num_kv_blocks=256, block_size=4)
pids = [os.getpid(), *(process.pid for process in llm.engine.executor.runner.rank_group.processes)]
try:
    for number, _ in enumerate(llm.stream([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))):
        if number == 3:
            os.kill(pids[{victim}], 15 if {victim} == 0 else 9)
except NanoflowError as error:
    print(error, file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    lines = process.stderr.splitlines()
    if victim == 0:
        assert process.returncode == -signal.SIGTERM
        assert lines == []
    else:
        assert len(lines) == 1
        assert "Rank 1 of 4 failed" in lines[0]


def test_time_in_which_nobody_looked_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle engine's rank may have been stopped and gone on as often as it liked."""
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes, "is_stopped", lambda pid: True)
    stopped = StoppedProcesses({1: 7})
    assert stopped.look() is None
    now[0] += 1000
    assert stopped.look() is None
    for _ in range(9):
        now[0] += 1
        assert stopped.look() is None
    now[0] += 1
    assert stopped.look() == 1
