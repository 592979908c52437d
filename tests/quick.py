"""Which tests `pytest -m quick` runs."""

from __future__ import annotations

import pytest


def mark_quick(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            item.add_marker(pytest.mark.quick)
