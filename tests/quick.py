"""Which tests are quick, so that `pytest -m quick` takes less than two minutes and touches every room.

The first `CASES` cases of each test, unless it has the mark `slow` or `own_process`, or needs a GPU. A new test needs a
mark only if one case of it takes more than half a second (`pytest -m quick --durations=20` shows which do).
"""

from __future__ import annotations

from collections import Counter

import pytest

CASES = 2
NOT_QUICK = ("slow", "own_process", "gpu")


def mark_quick(items: list[pytest.Item]) -> None:
    """Give the mark `quick` to those that are."""
    counts: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        counts[test] += 1
        if counts[test] <= CASES and not any(item.get_closest_marker(name) for name in NOT_QUICK):
            item.add_marker(pytest.mark.quick)
