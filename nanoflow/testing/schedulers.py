"""What every scheduler must do, whatever its policy."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

import pytest

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManagerContext
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.registry.registry import Registry
from nanoflow.testing.loads import MakeWorld, drive, explore
from nanoflow.testing.suite import Suite
from nanoflow.testing.world import ALPHABET, Limits, Request, World

both_depths = pytest.mark.parametrize("depth", [0, 1], ids=["in_turn", "overlap"])
both_managers = pytest.mark.parametrize("manager", ["plain", "prefix"])


class SchedulerSuite(Suite):
    """The scheduler with the block managers `plain` and `prefix`, a step at a time and with one in flight.

    Attributes:
        num_steps: steps of each random load.
        patience: most steps from the arrival of a request to its end, while others that the scheduler may like better
            keep coming.
        urgent: what those others ask for, if a scheduler heeds it.
        world: may add what this scheduler promises beyond the interface.
    """

    role = "scheduler"
    num_steps: ClassVar[int] = 3_000
    patience: ClassVar[int] = 5_000
    urgent: ClassVar[SamplingParams] = SamplingParams()
    world: ClassVar[type[World]] = World

    @classmethod
    def maker(cls, manager: str, salt: int = 0) -> MakeWorld:
        """What makes worlds with this scheduler and that block manager."""
        cls.plugin()
        return world_maker(cls.registry(), cls.choice(), PluginChoice(manager), cls.world, salt)

    @both_depths
    @both_managers
    def test_random_loads(self, manager: str, depth: int) -> None:
        """Requests that come, end and are aborted at random, in caches from roomy to too small for two."""
        counts = drive(self.maker(manager), random.Random(f"{manager} {depth}"), depth, self.num_steps)
        assert counts["ends"] > 0
        assert counts["aborts"] > 0
        assert manager == "plain" or counts["hits"] > 0

    @both_managers
    def test_any_calls(self, manager: str) -> None:
        """In the hands of hypothesis, which shows the shortest way to what fails."""
        explore(self.maker(manager), max_examples=40)

    @both_depths
    @both_managers
    @pytest.mark.parametrize("size", ["roomy", "tight"])
    def test_nobody_starves(self, size: str, manager: str, depth: int) -> None:
        """A long request ends in bounded time, though short ones with a prefix in common keep coming."""
        num_blocks = 64 if size == "roomy" else 12
        world = self.maker(manager)(Limits(num_blocks, block_size=4, max_num_seqs=3, budget=8, depth=depth))
        rng = random.Random(0)
        victim: Request | None = None
        for num_steps in range(self.patience):
            while len(world.live) < 6:
                world.add([1, 2, 1, 2, 0, 1, rng.randrange(ALPHABET)], rng.randint(1, 3), params=self.urgent)
            if num_steps == 10:
                victim = world.add([2] * 30, max_tokens=12)
            world.step()
            if victim is not None and victim.end is not None:
                break
        assert victim is not None
        assert victim.end is not None, f"{victim.sequence} has not ended after {self.patience} steps"
        world.drain()

    def test_values_of_tokens_do_not_matter(self) -> None:
        """Requests of the same lengths make the same batches, whatever the model answers."""
        limits = Limits(num_blocks=16, block_size=4, max_num_seqs=4, budget=12, depth=1)
        rng = random.Random(0)
        worlds = [self.maker("plain", salt)(limits) for salt in (0, 1)]
        for _ in range(200):
            arrivals = [(rng.randint(1, 20), rng.randint(1, 16)) for _ in range(rng.choice([0, 0, 1, 2]))]
            for world in worlds:
                for length, max_tokens in arrivals:
                    world.add([1] * length, max_tokens)
                world.step()
            entries = [
                [(s.request_id, start, count) for batch in list(world.in_flight)[-1:]
                 for s, start, count in zip(batch.sequences, batch.starts, batch.num_tokens, strict=True)]
                for world in worlds
            ]  # fmt: skip
            assert entries[0] == entries[1]
        outputs = [[request.tokens for request in world.requests.values()] for world in worlds]
        assert outputs[0] != outputs[1], "the models differ"
        for world in worlds:
            world.drain()

    @both_managers
    def test_a_lone_request(self, manager: str) -> None:
        """It is prefilled in chunks of the budget, or as many as the scheduler likes, and decodes to its end."""
        for prompt_len in (1, 4, 5, 33):
            world = self.maker(manager)(Limits(num_blocks=12, block_size=4, max_num_seqs=2, budget=8, depth=0))
            request = world.add([1] * prompt_len, max_tokens=6)
            world.drain()
            assert (request.end, len(request.tokens)) == ("length", prompt_len + 6)

    def test_nothing_to_do(self) -> None:
        world = self.maker("plain")(Limits(num_blocks=4, block_size=4, max_num_seqs=2, budget=8, depth=0))
        assert world.scheduler.schedule() is None
        assert world.scheduler.abort("nobody") is None
        request = world.add([1, 2], max_tokens=3)
        world.abort(0)
        assert request.end == "abort"
        assert world.scheduler.schedule() is None

    @both_managers
    def test_abort_in_flight(self, manager: str) -> None:
        """The result of a step that was submitted before is ignored, and the blocks serve others at once."""
        world = self.maker(manager)(Limits(num_blocks=4, block_size=2, max_num_seqs=2, budget=8, depth=1))
        world.add([1, 2, 0, 1, 2], max_tokens=4)
        world.step()
        world.abort(0)
        other = world.add([2, 2, 2, 2, 2], max_tokens=4)
        world.drain()
        assert other.end == "length"


def world_maker(
    registry: Registry, scheduler: PluginChoice, manager: PluginChoice, world: Callable[..., World], salt: int = 0
) -> MakeWorld:
    """What makes worlds of any size with these plugins."""
    scheduler_entry = registry.get("scheduler", scheduler.name)
    manager_entry = registry.get("block_manager", manager.name)
    manager_config = registry.options(manager_entry, manager.options)

    def make(limits: Limits) -> World:
        context = BlockManagerContext(limits.num_blocks, limits.block_size)
        blocks = manager_entry.component.build(manager_config, context)
        sizes = {"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.budget}
        config = registry.options(scheduler_entry, scheduler.options | sizes)
        built = scheduler_entry.component.build(config, SchedulerContext(blocks, limits.max_tokens + 1))
        return world(built, blocks, limits, salt)

    return make
