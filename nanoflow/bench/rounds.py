"""How often to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoflow.bench.progress import Progress


@dataclass(frozen=True)
class Rounds:
    """How often to do something.

    Attributes:
        warmup: rounds that don't count.
        repeats: rounds that do.
        progress: show a bar, as standard error is a terminal.
    """

    warmup: int = 1
    repeats: int = 3
    progress: bool = False

    def run(self, name: str, action: Callable[[int], Any]) -> list[Any]:
        """What `action` returned in the rounds that count; it gets the number of the round, from 0."""
        total = self.warmup + self.repeats
        results = []
        with Progress(name, total, "round", bar=self.progress) as progress:
            for number in range(total):
                results.append(action(number))
                progress.add()
        return results[self.warmup :]
