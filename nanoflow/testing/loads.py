"""Random loads for a `World`: by volume, and in the hands of hypothesis, which shrinks what it finds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from nanoflow.testing.world import ALPHABET, Limits, World

# The same in every run, and of what fails the shortest case and no more.
KIT = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
MakeWorld = Callable[[Limits], World]


def random_limits(rng: random.Random, depth: int) -> Limits:
    """From roomy to so tight that one request fills it."""
    max_num_seqs = rng.randint(1, 6)
    return Limits(
        num_blocks=rng.randint(2, 24), block_size=rng.choice([1, 2, 3, 4, 8]), max_num_seqs=max_num_seqs,
        budget=max_num_seqs + rng.choice([0, 1, 3, 8, 30]), depth=depth,
    )  # fmt: skip


def random_prompt(rng: random.Random, limits: Limits, stems: list[list[int]]) -> list[int]:
    """A part of a common stem, and some tokens of its own."""
    stem = rng.choice(stems)
    own = [rng.randrange(ALPHABET) for _ in range(rng.randint(1, 2 * limits.block_size))]
    return stem[: rng.randint(0, len(stem))] + own


def drive(make_world: MakeWorld, rng: random.Random, depth: int, num_steps: int) -> Counter[str]:
    """Random adds, aborts, finishes and steps, in many worlds one after the other; returns what happened."""
    counts: Counter[str] = Counter()
    while counts["steps"] < num_steps:
        world = make_world(random_limits(rng, depth))
        stems = [[rng.randrange(ALPHABET) for _ in range(rng.randint(1, 30))] for _ in range(2)]
        load = rng.choice([2, 4, 10])  # requests that it tries to keep unfinished
        while world.counts["steps"] < 300:
            while len(world.live) < load and rng.random() < 0.5:
                stops, has_grammar = rng.random() < 0.3, rng.random() < 0.3
                prompt = random_prompt(rng, world.limits, stems)
                identity = rng.choice([b"", b"", b"a", b"b"])
                world.add(prompt, rng.randint(1, 24), stops=stops, has_grammar=has_grammar, identity=identity)
            if world.live and rng.random() < 0.02:
                world.abort(rng.randrange(len(world.live)))
            world.step(finish=rng.randrange(8) if rng.random() < 0.03 else None)
        world.drain()
        counts += world.counts
    return counts


class Machine(RuleBasedStateMachine):
    """Any calls in any order, in a world of any size."""

    def __init__(self, make_world: MakeWorld) -> None:
        super().__init__()
        self.make_world = make_world

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), max_num_seqs=st.integers(1, 4),
        spare=st.integers(0, 12), depth=st.integers(0, 1), stem=st.lists(st.integers(0, ALPHABET - 1), max_size=16),
    )  # fmt: skip
    def begin(self, spare: int, stem: list[int], **sizes: int) -> None:
        self.world = self.make_world(Limits(budget=sizes["max_num_seqs"] + spare, **sizes))
        self.stem = stem

    @rule(
        shared=st.integers(0, 16), own=st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=6),
        max_tokens=st.integers(1, 12), stops=st.booleans(), has_grammar=st.booleans(),
        identity=st.sampled_from([b"", b"a"]),
    )  # fmt: skip
    def add(self, shared: int, own: list[int], **options: Any) -> None:
        self.world.add(self.stem[:shared] + own, **options)

    @precondition(lambda self: self.world.live)
    @rule(index=st.integers(0, 8))
    def abort(self, index: int) -> None:
        self.world.abort(index)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule(which=st.integers(0, 4))
    def step_and_finish(self, which: int) -> None:
        self.world.step(finish=which)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def explore(make_world: MakeWorld, max_examples: int) -> None:
    """Let hypothesis call scheduler and block manager in `max_examples` worlds, the same ones in every run."""
    run_state_machine_as_test(
        lambda: Machine(make_world), settings=settings(KIT, max_examples=max_examples, stateful_step_count=40)
    )


@contextmanager
def collisions(module: ModuleType) -> Iterator[None]:
    """Make the hash functions that `module` uses, xxhash's and Python's own, return one of three values."""

    def few(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, **options: function(*args, **options) % 3

    patched = {name: few(getattr(xxhash, name)) for name in dir(xxhash) if name.endswith("_intdigest")}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in patched.items():
            original = getattr(xxhash, name)
            patch.setattr(xxhash, name, function)
            for alias, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, alias, function)
        patch.setattr(module, "hash", few(hash), raising=False)
        yield
