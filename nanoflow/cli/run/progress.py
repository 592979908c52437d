"""The progress of a batch on a terminal."""

from __future__ import annotations

import time

from tqdm import tqdm

from nanoflow.core.data.outputs import RequestOutput


class BatchProgress:
    """A bar on standard error: prompts done, the time that is left, and output tokens a second.

    Args:
        total: prompts; None if nobody knows.
        num_done: those that an earlier run has done.
    """

    def __init__(self, total: int | None, num_done: int) -> None:
        self.bar = tqdm(total=total, initial=num_done, desc="Completed", unit="prompt", dynamic_ncols=True)
        self.start = time.perf_counter()
        self.num_tokens = 0

    def add(self, result: RequestOutput) -> None:
        """Count a prompt that is done."""
        self.num_tokens += sum(len(completion.token_ids) for completion in result.outputs)
        rate = self.num_tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Leave it as it stands."""
        self.bar.close()
