"""Telling of steps that no CUDA graph fits, which are launched kernel by kernel."""

from __future__ import annotations

import logging

logger = logging.getLogger("nanoflow")


class UncapturedSteps:
    """Logs the first such step of each size, sizes being powers of two."""

    def __init__(self) -> None:
        self.told: set[tuple[int, int]] = set()

    def note(self, num_tokens: int, num_seqs: int) -> None:
        """There was one."""
        size = num_tokens.bit_length(), num_seqs.bit_length()
        if size not in self.told and logger.isEnabledFor(logging.INFO):
            self.told.add(size)
            logger.info(
                "no CUDA graph fits a step of %d tokens of %d sequences, nor maybe others of about that size",
                num_tokens, num_seqs,
            )  # fmt: skip
