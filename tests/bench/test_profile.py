"""What is read from a profile, and the share of the floor."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.bench import profile
from nanoflow.bench.result import Floor, Result
from nanoflow.workloads.floor import Speed, Work


def test_the_share_of_the_floor() -> None:
    known = Floor({"linear": Work(bytes=10), "head": Work(bytes=5)}, Speed(bandwidth=10, flops=1))
    result = Result("decode-1", "ms", [2.0, 3.0, 9.0], floor=known)
    assert (result.median, result.reached) == (3000, 50)


def kernel(start: float, duration: float, name: str = "k", **fields: Any) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "tid": 7, **fields}


def test_idle_time_is_what_no_kernel_covers() -> None:
    events = [kernel(0, 40), kernel(30, 20), kernel(52, 8), kernel(80, 20), {"cat": "cpu_op", "ts": 0, "dur": 999}]
    found = profile.idle(events)
    assert found is not None
    assert found.share == pytest.approx(0.22)
    assert found.waiting == pytest.approx(0.20)
    assert profile.idle(events[-1:]) is None


def test_kernels_are_grouped_by_name() -> None:
    events = [kernel(0, 3, "void gemm<4>(float*)"), kernel(5, 4, "void gemm<4>(half*)"), kernel(10, 5, "add")]
    found = [(kernel.name, kernel.calls, kernel.seconds) for kernel in profile.top_kernels(events, 5)]
    assert found == [("gemm<4>", 2, pytest.approx(7e-6)), ("add", 1, pytest.approx(5e-6))]


def test_an_operator_s_own_time_is_without_that_of_those_inside() -> None:
    events = [
        kernel(start, duration, name, cat="cpu_op")
        for name, start, duration in (
            ("outer", 0, 10),
            ("inner", 1, 4),
            ("innermost", 2, 1),
            ("inner", 6, 2),
            ("next", 10, 3),
        )
    ]
    found = {kernel.name: kernel.seconds for kernel in profile.top_kernels(events, 9)}
    assert found == {name: pytest.approx(t * 1e-6) for name, t in
                     {"outer": 4, "inner": 5, "innermost": 1, "next": 3}.items()}  # fmt: skip
