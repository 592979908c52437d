"""nanoflow's own tests for schedulers, and the order in which this one serves."""

from __future__ import annotations

import pytest

from nanoflow.plugin import ConfigError
from nanoflow.testing import SchedulerSuite
from nanoflow.testing.world import Limits
from nanoflow_sjf import ShortestConfig


class TestShortest(SchedulerSuite):
    component = "shortest"

    def test_order(self) -> None:
        """Short ones overtake a long one that waits, but no more of them than its length allows."""
        world = self.maker("plain")(Limits(num_blocks=32, block_size=4, max_num_seqs=1, budget=8, depth=0))
        long = world.add([1] * 20, max_tokens=5)
        short = [world.add([1] * 3, max_tokens=2) for _ in range(25)]
        while long.end is None:
            world.step()
        served = sum(request.end is not None for request in short)
        assert served == 19  # they count as 6 to 24 tokens; the next one would count as 25, and the long one came first
        world.drain()


def test_an_aging_that_lets_requests_starve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.aging must be a number > 0, got 0"):
        ShortestConfig(aging=0)
