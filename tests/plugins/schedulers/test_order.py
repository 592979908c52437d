"""Who goes first, and for how long others may."""

from __future__ import annotations

import time
from statistics import median

import pytest

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManagerContext
from nanoflow.core.contracts.scheduler import Scheduler, SchedulerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions
from nanoflow.core.registry.registry import Registry
from nanoflow.plugins.block_managers.radix import RadixBlockManager


def scheduler(name: str, num_blocks: int = 64, **options: object) -> Scheduler:
    registry = Registry.load(extra=[])
    entry = registry.get("scheduler", name)
    config = registry.options(entry, {"max_num_seqs": 1, "max_num_batched_tokens": 64, **options})
    blocks = RadixBlockManager(NoOptions(), BlockManagerContext(num_blocks, 2))
    return entry.component.build(config, SchedulerContext(blocks, 128))


def request(name: str, prompt: list[int] | None = None, max_tokens: int = 1, priority: int = 0) -> Sequence:
    return Sequence(name, prompt or [1, 2, 3], SamplingParams(priority=priority), max_tokens=max_tokens)


def step(made: Scheduler) -> list[str]:
    """Who took part; each step brings one token to each."""
    batch = made.schedule()
    assert batch is not None
    for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
        if samples:
            sequence.append_token(5)
    made.update(batch)
    return [sequence.request_id for sequence in batch.sequences]


def order(made: Scheduler, *sequences: Sequence) -> str:
    """Names in the order in which they were served, one at a time."""
    for sequence in sequences:
        made.add(sequence)
    served: list[str] = []
    while made.num_waiting + made.num_running:
        served += step(made)
    return "".join(dict.fromkeys(served))


def test_fcfs() -> None:
    assert order(scheduler("fcfs"), request("a", priority=9), request("b", max_tokens=5), request("c")) == "abc"


def test_the_smallest_priority_goes_first_and_equal_ones_by_arrival() -> None:
    waiting = [request(name, priority=level) for name, level in (("a", 1), ("b", 0), ("c", -2), ("d", 0), ("e", 1))]
    assert order(scheduler("priority"), *waiting) == "cbdae"


@pytest.mark.parametrize(("aging", "passed_by"), [(10, 20), (3, 6), (None, 100)])
def test_priorities_age(aging: int | None, passed_by: int) -> None:
    """Two levels less urgent: those that come up to `2 * aging` steps later go first, and no more."""
    made = scheduler("priority", aging=aging)
    made.add(request("old", priority=2))
    served = []
    for number in range(100):
        made.add(request(f"new{number}"))
        served += step(made)
        if "old" in served:
            break
    assert len(served) - ("old" in served) == pytest.approx(passed_by, abs=1)


def test_the_shortest_goes_first() -> None:
    lengths = {"a": (3, 9), "b": (9, 2), "c": (3, 2), "d": (4, 1)}
    waiting = [request(name, [1] * prompt, output) for name, (prompt, output) in lengths.items()]
    assert order(scheduler("sjf"), *waiting) == "cdba"


@pytest.mark.parametrize(("aging", "starves"), [(1.0, False), (0, True)])
def test_long_jobs_age(aging: float, starves: bool) -> None:
    made = scheduler("sjf", aging=aging)
    made.add(request("long", [1] * 20, 10))
    served = []
    for number in range(60):
        made.add(request(f"short{number}"))
        served += step(made)
    assert ("long" in served) == (not starves)


def test_the_longest_match_goes_first() -> None:
    """The others of a family follow the first, though those of the other family came before."""
    families = {"x": [1] * 8, "y": [2] * 8}
    waiting = [request(f"{family}{i}", [*stem, 3 + i]) for i in range(3) for family, stem in families.items()]
    assert order(scheduler("fcfs"), *waiting) == "x0y0x1y1x2y2"
    waiting = [request(s.request_id, s.token_ids) for s in waiting]
    assert order(scheduler("lpm"), *waiting) == "x0x1x2y0y1y2"


def test_a_match_may_pass_others_for_so_long() -> None:
    made = scheduler("lpm", max_wait=10)
    made.add(request("warm", [1] * 9))
    step(made)
    made.add(request("old", [2] * 9))
    served = []
    while "old" not in served:
        made.add(request(f"new{len(served)}", [1] * 9))
        served += step(made)
    assert 9 <= len(served) <= 12


def test_the_last_in_line_gives_way() -> None:
    """Not the newest, but the least urgent; it keeps what it has and is served at last."""
    made = scheduler("priority", num_blocks=6, max_num_seqs=2)
    late, urgent = request("late", [1] * 4, 7, priority=1), request("urgent", [2] * 4, 7)
    made.add(late)
    step(made)
    made.add(urgent)
    assert order(made) == "lateurgent"
    assert (late.num_preemptions > 0, urgent.num_preemptions) == (True, 0)
    assert (late.num_output_tokens, urgent.num_output_tokens) == (7, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcfs", "priority", "sjf", "lpm"])
def test_thousands_may_wait(name: str) -> None:
    """The work of a step does not grow with the line: with 16 times as many it takes less than 4 times as long."""
    seconds = []
    for num_waiting in (500, 8000):
        made = scheduler(name, num_blocks=2000, max_num_seqs=16)
        for number in range(num_waiting):
            made.add(request(str(number), [number % 7] * 64 + [number] * 64, 4, priority=number % 3))
        steps = []
        for _ in range(60):
            start = time.perf_counter()
            step(made)
            steps.append(time.perf_counter() - start)
        seconds.append(median(steps))
    assert seconds[1] < 4 * seconds[0], seconds
