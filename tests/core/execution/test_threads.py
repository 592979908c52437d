"""How many threads steps take on a CPU, and that the caller's number is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoflow import LLM
from nanoflow.core.distributed import launch
from nanoflow.core.distributed.cores import busy_cores, usable_cores
from nanoflow.core.distributed.launch import worker_environment
from nanoflow.core.execution import num_threads
from nanoflow.core.execution.num_threads import pick_num_threads
from nanoflow.core.execution.threads import Threads
from tests.core.running import engine_of, greedy

LARGE = 100 * num_threads.WEIGHTS_PER_THREAD


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A host of 16 cores that does nothing, for which PyTorch would take 16 threads."""
    host = {"cores": 16, "busy": 0.0, "torch": 16}
    monkeypatch.setattr(num_threads, "usable_cores", lambda: host["cores"])
    monkeypatch.setattr(num_threads, "busy_cores", lambda: host["busy"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: host["torch"])
    return host


def test_large_layers_take_the_cores_that_are_idle(host: dict[str, float]) -> None:
    assert pick_num_threads(None, LARGE) == 16
    host["busy"] = 10.2
    assert pick_num_threads(None, LARGE) == 6
    host["busy"] = 90.0
    assert pick_num_threads(None, LARGE) == 1


def test_ranks_share_the_cores(host: dict[str, float]) -> None:
    assert pick_num_threads(None, LARGE, num_ranks=4) == 4
    assert pick_num_threads(None, LARGE, num_ranks=32) == 1


def test_workers_share_the_cores_from_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [worker_environment(size)["OMP_NUM_THREADS"] for size in (2, 3, 16)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environment(2)["OMP_NUM_THREADS"] == "5"


def test_small_layers_take_one_thread(host: dict[str, float]) -> None:
    assert pick_num_threads(None, 800_000) == 1
    assert pick_num_threads(None, 3_000_000) == 3


def test_what_is_said_holds(host: dict[str, float]) -> None:
    assert pick_num_threads(7, 1, num_ranks=4) == 7
    host["torch"] = 2  # such as by OMP_NUM_THREADS
    assert pick_num_threads(None, LARGE) == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_the_callers_number_is_left_alone() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with Threads(before + 1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("accelerate", [True, False])
def test_steps_take_the_number_that_is_told(accelerate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), set()
    with LLM(device="cpu", num_threads=2, num_kv_blocks=8, accelerate=accelerate) as llm:
        model = engine_of(llm).executor.runner.model
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda *args: (seen.add(torch.get_num_threads()), forward(*args))[1])
        llm.generate([[1, 2, 3]], greedy(3), use_tqdm=False)
        assert llm.describe()["device"] == "cpu (2 threads)"
    assert seen == {2}
    assert torch.get_num_threads() == before


def test_the_bundled_model_takes_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with LLM(device="cpu", num_kv_blocks=8) as llm:
            assert llm.describe()["device"] == "cpu (1 thread)"
            llm.generate([[1, 2, 3]], greedy(2), use_tqdm=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("load", "running", "busy"), [(8.0, 7, 6), (8.0, 1, 0), (0.5, 9, 0.5), (3.0, None, 3.0)])
def test_what_has_just_ended_is_not_busy(
    load: float, running: int | None, busy: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    if running is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/loadavg").write_text(f"{load} 0 0 {running}/157 1234")
    assert busy_cores(tmp_path) == busy
