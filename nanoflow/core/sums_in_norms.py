"""Sums over ranks that are made together with the norm behind them: which ones, and by which exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_ROWS = 1024  # a power of two
MOST_DIRECT = 384 * 1024  # bytes that all ranks send all others, if there are more than two


@dataclass(frozen=True)
class SumsInNorms:
    """One rank's part in them, by `kernels.ranks`, whose arguments the attributes are.

    Attributes:
        rank: this one.
        most_bytes: of a sum; larger ones are left to others.
        inboxes, calls, left: as `sum_add_rms_norm` takes them.
    """

    rank: int
    most_bytes: int
    inboxes: torch.Tensor
    calls: torch.Tensor
    left: torch.Tensor

    @classmethod
    def over(cls, addresses: list[int], rank: int, most_bytes: int, device: torch.device) -> SumsInNorms:
        """Over ranks with inboxes at these addresses, each int32 [`shape_of_inbox`], full of -1."""
        return cls(
            rank,
            most_bytes,
            inboxes=torch.tensor(addresses, dtype=torch.int64, device=device),
            calls=torch.zeros(MOST_ROWS, dtype=torch.int32, device=device),
            left=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @staticmethod
    def shape_of_inbox(num_ranks: int, most_bytes: int) -> tuple[int, int, int]:
        return 2, num_ranks, most_bytes // 4

    def take(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        """As `Group.sums_in_norm`."""
        fits = num_rows * size * dtype.itemsize <= self.most_bytes
        return fits and 0 < num_rows <= MOST_ROWS and size * dtype.itemsize % 4 == 0

    def sum_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Group.sum_add_norm`."""
        from nanoflow.core.kernels.ranks import sum_add_rms_norm

        num_ranks = len(self.inboxes)
        owned = num_ranks > 2 and len(residual_TD) >= num_ranks and residual_TD.nbytes > MOST_DIRECT
        return sum_add_rms_norm(
            x, residual_TD, weight_D, eps, self.inboxes, self.calls, self.left, self.rank, self.most_bytes // 4,
            owned=owned,
        )  # fmt: skip
