"""How far a measurement is, and how long it will take: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

PERIOD = 10.0  # seconds between two lines; what ends before the first needs none


class Progress:
    """Progress on standard error.

    Args:
        name: what is measured.
        total: steps of it.
        unit: what a step is.
        bar: standard error is a terminal.
    """

    def __init__(self, name: str, total: int, unit: str, *, bar: bool) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.bar = tqdm(total=total, desc=name, unit=unit, leave=False, dynamic_ncols=True) if bar else None
        self.done = 0
        self.start = self.told = time.perf_counter()

    def add(self) -> None:
        """A step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
            return
        now = time.perf_counter()
        if now - self.told >= PERIOD and self.done < self.total:
            self.told = now
            left = (now - self.start) * (self.total - self.done) / self.done
            what = f"{self.name}: {self.done} of {self.total} {self.unit}s"
            print(f"{what}, about {left:,.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
