"""Scheduler and block manager together, under random loads: the invariants are in `world.py`."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from nanoflow.plugins.block_managers import prefix
from tests.plugins.world import ALPHABET, MANAGERS, World

STEPS = 40_000  # of each of the four combinations below: 160,000 in all


def few_digests(data: bytes) -> int:
    """A hash function whose every third pair of inputs collides."""
    return xxhash.xxh3_64_intdigest(data) % 3


def random_prompt(rng: random.Random, world: World, stems: list[list[int]]) -> list[int]:
    """A part of a common stem, and some tokens of its own."""
    stem = rng.choice(stems)
    own = [rng.randrange(ALPHABET) for _ in range(rng.randint(1, 2 * world.block_size))]
    return stem[: rng.randint(0, len(stem))] + own


def random_world(rng: random.Random, manager: str, depth: int) -> World:
    """From roomy to so tight that one request fills it."""
    max_num_seqs = rng.randint(1, 6)
    return World(
        manager=manager, depth=depth, num_blocks=rng.randint(2, 24), block_size=rng.choice([1, 2, 3, 4, 8]),
        max_num_seqs=max_num_seqs, budget=max_num_seqs + rng.choice([0, 1, 3, 8, 30]),
    )  # fmt: skip


def drive(rng: random.Random, manager: str, depth: int, num_steps: int) -> Counter[str]:
    """Random adds, aborts, finishes and steps, in many worlds one after the other; returns what happened."""
    counts: Counter[str] = Counter()
    while counts["steps"] < num_steps:
        world = random_world(rng, manager, depth)
        stems = [[rng.randrange(ALPHABET) for _ in range(rng.randint(1, 30))] for _ in range(2)]
        load = rng.choice([2, 4, 10])  # requests that it tries to keep unfinished
        while world.counts["steps"] < 300:
            while len(world.live) < load and rng.random() < 0.5:
                stops, has_grammar = rng.random() < 0.3, rng.random() < 0.3
                world.add(random_prompt(rng, world, stems), rng.randint(1, 24), stops, has_grammar)
            if world.live and rng.random() < 0.02:
                world.abort(rng.randrange(len(world.live)))
            world.step(finish=rng.randrange(8) if rng.random() < 0.03 else None)
        world.drain()
        counts += world.counts
    return counts


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("manager", MANAGERS)
def test_volume(manager: str, depth: int) -> None:
    counts = drive(random.Random(f"{manager} {depth}"), manager, depth, STEPS)
    print(f"{manager}, depth {depth}: {dict(counts)}")
    assert counts["steps"] >= STEPS
    assert min(counts[what] for what in ("preemptions", "aborts", "ends", "mixed", "chunks")) > 100
    assert (counts["hits"] > 1000) == (manager == "prefix")


@pytest.mark.parametrize("depth", [0, 1])
def test_hash_collisions_never_mix_prompts(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all blocks collide, and still every sequence reads its own tokens only."""
    monkeypatch.setattr(prefix, "xxhash", SimpleNamespace(xxh3_64_intdigest=few_digests))
    counts = drive(random.Random(depth), "prefix", depth, 5_000)
    assert counts["hits"] > 20


class Machine(RuleBasedStateMachine):
    """The same in hypothesis' hands, which shrinks what it finds."""

    manager = "prefix"

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), max_num_seqs=st.integers(1, 4),
        spare=st.integers(0, 12), depth=st.integers(0, 1), stem=st.lists(st.integers(0, ALPHABET - 1), max_size=16),
    )  # fmt: skip
    def begin(self, spare: int, stem: list[int], **options: Any) -> None:
        self.world = World(manager=self.manager, budget=options["max_num_seqs"] + spare, **options)
        self.stem = stem

    @rule(
        shared=st.integers(0, 16), own=st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=6),
        max_tokens=st.integers(1, 12), stops=st.booleans(), has_grammar=st.booleans(),
    )  # fmt: skip
    def add(self, shared: int, own: list[int], max_tokens: int, stops: bool, has_grammar: bool) -> None:
        self.world.add(self.stem[:shared] + own, max_tokens, stops, has_grammar)

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


class PlainMachine(Machine):
    manager = "plain"


class TestPrefixMachine(Machine.TestCase):
    settings = settings(max_examples=80, stateful_step_count=40)


class TestPlainMachine(PlainMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=40)
