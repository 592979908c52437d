"""What all tests share: Triton's interpreter where there is no GPU, which tests are quick, and what no test may do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.hygiene import Leftovers, forbid_missing_packages
from tests.own_process import run_in_own_process
from tests.quick import mark_quick

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, which is later

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)

LEFTOVERS = pytest.StashKey[Leftovers]()

torch.set_num_threads(1)  # tiny models gain nothing from more, and the workers of a parallel run share the cores

settings.register_profile(
    "nanoflow",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nanoflow")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFTOVERS] = Leftovers()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_quick(items)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return run_in_own_process(pyfuncitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    return forbid_missing_packages(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    return forbid_missing_packages(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Item | None) -> Iterator[None]:
    """Behind the last test of a file, when its fixtures are gone, so must be all that its tests started."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        item.funcargs.clear()  # engines that were not closed end when nobody holds them
        left = item.config.stash[LEFTOVERS].take()
        assert not left, f"tests of {item.path.name} left behind: {', '.join(left)}"
    return result
