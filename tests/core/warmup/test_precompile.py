"""The process that compiles ahead: when it is started, waited for and ended. Others take its place here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoflow.core.config.engine_config import Config, EngineConfig
from nanoflow.core.data.parallel import ParallelContext
from nanoflow.core.distributed.rank_group import RankGroup
from nanoflow.core.execution.plan import Plan, make_plan
from nanoflow.core.registry.registry import Registry
from nanoflow.core.warmup import precompile
from nanoflow.core.warmup.fake_cuda import GPU

pytest.importorskip("triton")
SINGLE_RANK = RankGroup(ParallelContext(), None)
CONFIG = Config(engine=EngineConfig(device="cpu"))
READS = "import pickle, sys; job = pickle.load(sys.stdin.buffer); "


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Plan]:
    """An engine's on a GPU, and an empty cache of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(GPU, "at", lambda device: GPU(device, (9, 0), {"name": "H100"}))
    yield replace(make_plan(CONFIG, Registry.load(), SINGLE_RANK), device=torch.device("cuda", 0))
    with suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG)[0] == 0, "a process was left behind"


def helped(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(precompile, "COMMAND", (sys.executable, "-c", READS + code))


def logs(tmp_path: Path) -> list[str]:
    return [file.read_text() for file in (tmp_path / "nanoflow").iterdir()]


@pytest.mark.slow
def test_once(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The job arrives, and is done once for each kind of engine."""
    helped(monkeypatch, f"open({str(tmp_path / 'done')!r}, 'a').write(job[0].checkpoint + ' ')")
    for other in (plan, plan, replace(plan, dtype=torch.float16), plan):
        with precompile.precompiled(CONFIG, other, SINGLE_RANK) as wait:
            wait()
    assert (tmp_path / "done").read_text() == f"{CONFIG.checkpoint} " * 2
    assert logs(tmp_path) == ["", ""]


@pytest.mark.slow
def test_what_went_wrong_is_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helped(monkeypatch, "raise ValueError('of no use')")
    for _ in range(2):
        with precompile.precompiled(CONFIG, plan, SINGLE_RANK) as wait:
            wait()
    (log,) = logs(tmp_path)
    assert log.endswith("ValueError: of no use\n")


def test_it_ends_with_a_start_that_fails(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helped(monkeypatch, "import time; time.sleep(100)")
    before = time.monotonic()
    with pytest.raises(ZeroDivisionError), precompile.precompiled(CONFIG, plan, SINGLE_RANK):
        raise ZeroDivisionError
    assert time.monotonic() - before < 50
    assert logs(tmp_path) == []  # the next start tries again


def test_nobody_waits_for_ever(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    helped(monkeypatch, "import time; time.sleep(100)")
    monkeypatch.setattr(precompile, "PATIENCE", 0.1)
    before = time.monotonic()
    with precompile.precompiled(CONFIG, plan, SINGLE_RANK) as wait:
        wait()
    assert time.monotonic() - before < 50


def test_a_process_that_cannot_be_started(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precompile, "COMMAND", (str(tmp_path / "nothing"),))
    with precompile.precompiled(CONFIG, plan, SINGLE_RANK) as wait:
        wait()


def test_a_job_that_cannot_be_sent(plan: Plan) -> None:
    with precompile.precompiled(CONFIG, replace(plan, hf_config={"lambda": lambda: None}), SINGLE_RANK) as wait:
        wait()


def test_who_has_none(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines on a CPU, and all ranks of a host but one."""
    helped(monkeypatch, "raise AssertionError")
    for its_plan, rank_group in (
        (replace(plan, device=torch.device("cpu")), SINGLE_RANK),
        (plan, RankGroup(ParallelContext(1, 2), None)),
        (plan, RankGroup(ParallelContext(4, 8), None, local_rank=1)),
    ):
        with precompile.precompiled(CONFIG, its_plan, rank_group) as wait:
            wait()
    assert not (tmp_path / "nanoflow").exists()


@pytest.mark.slow
def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """The helper runs what it is told to, and not the script that an engine is built in."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from nanoflow.core.warmup.precompile import Helper\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
        f"helper = Helper({(sys.executable, '-c', READS)!r}, None, Path({str(tmp_path / 'stamp')!r}))\n"
        "helper.wait()\n"
        "helper.close()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=100)
    assert (tmp_path / "runs").read_text() == "x"
    assert (tmp_path / "stamp").read_text() == ""


@pytest.mark.slow
def test_it_ends_with_the_engine(tmp_path: Path) -> None:
    """Also if that is killed: what compiles reads to the end of its input, which comes then."""
    helper = (
        "import os, sys, threading, time; from nanoflow.core.warmup.trace_kernels import end_with_engine; "
        "threading.Thread(target=end_with_engine, daemon=True).start(); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(100)"
    )
    engine = (
        f"import os, time; from pathlib import Path; from nanoflow.core.warmup.precompile import Helper; "
        f"pid = Path({str(tmp_path / 'pid')!r}); "
        f"helper = Helper({(sys.executable, '-c', READS + helper)!r}, None, Path({str(tmp_path / 'stamp')!r}))\n"
        "while not pid.exists() or not pid.read_text().endswith(' '): time.sleep(0.01)\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", engine], check=True, timeout=100)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 50
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
