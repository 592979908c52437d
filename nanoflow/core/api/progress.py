"""The progress bar of a call."""

from __future__ import annotations

import time
from dataclasses import replace

from tqdm import tqdm

from nanoflow.core.data.outputs import EngineStats


class Progress:
    """A progress bar: prompts done, and tokens a second of prefill and decode.

    Args:
        stats: the engine's, read as it grows.
        total: prompts.
    """

    def __init__(self, stats: EngineStats, total: int) -> None:
        self.stats = stats
        self.bar = tqdm(total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True)
        self.start = time.perf_counter()
        self.before = replace(stats)

    def show(self, num_done: int) -> None:
        """Bring the bar up to date; cheap enough for every step."""
        elapsed = time.perf_counter() - self.start
        prefill = (self.stats.num_prefill_tokens - self.before.num_prefill_tokens) / elapsed
        decode = (self.stats.num_decode_tokens - self.before.num_decode_tokens) / elapsed
        self.bar.set_postfix_str(f"prefill {prefill:,.0f} tok/s, decode {decode:,.0f} tok/s", refresh=False)
        self.bar.update(num_done - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
