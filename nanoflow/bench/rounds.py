"""How often to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Rounds:
    """How often to do something.

    Attributes:
        warmup: rounds that don't count.
        repeats: rounds that do.
        progress: show a bar.
    """

    warmup: int = 1
    repeats: int = 3
    progress: bool = False

    def run(self, name: str, action: Callable[[int], Any]) -> list[Any]:
        """What `action` returned in the rounds that count; it gets the number of the round, from 0."""
        rounds = range(self.warmup + self.repeats)
        bar = tqdm(rounds, desc=name, unit="round", disable=not self.progress, leave=False, dynamic_ncols=True)
        return [action(number) for number in bar][self.warmup :]
