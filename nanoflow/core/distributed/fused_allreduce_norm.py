"""Sums over ranks that are made together with the norm behind them: which ones, and by which exchange."""

from __future__ import annotations

import torch

from nanoflow.core.data.parallel import Group
from nanoflow.core.ops import Ops

MOST_ROWS = 1024  # a power of two
MOST_DIRECT = 384 * 1024  # bytes that all ranks send all others, if there are more than two


class FusedAllReduceNorm(Group):
    """Ranks that make small sums so (`Ops.allreduce_add_rms_norm`), once they know of each other's inboxes (`use`).

    Attributes:
        most_bytes: of such a sum.
        inboxes, calls, left, rank: as `allreduce_add_rms_norm` takes them.
        ops: to sum with.
    """

    def use(self, addresses: list[int], rank: int, most_bytes: int, device: torch.device, ops: Ops) -> None:
        """Exchange by inboxes at these addresses, each int32 [`shape_of_inbox`], all of it `ops.allreduce.EMPTY`."""
        self.ops = ops
        self.rank, self.most_bytes = rank, most_bytes
        self.inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.calls = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
        self.left = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def shape_of_inbox(num_ranks: int, most_bytes: int) -> tuple[int, int, int]:
        """By call, sender and word, of 4 bytes."""
        return 2, num_ranks, most_bytes // 4

    def fuses_norm(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        fits = num_rows * size * dtype.itemsize <= self.most_bytes
        return fits and 0 < num_rows <= MOST_ROWS and size * dtype.itemsize % 4 == 0

    def allreduce_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_ranks = len(self.inboxes)
        owned = num_ranks > 2 and len(residual_TD) >= num_ranks and residual_TD.nbytes > MOST_DIRECT
        found = self.ops.allreduce_add_rms_norm(
            x, residual_TD, weight_D, eps, self.inboxes, self.calls, self.left, self.rank, self.most_bytes // 4,
            owned=owned,
        )  # fmt: skip
        if found is None:
            part_TD = x if x.dim() == 2 else x.sum(0)
            total_TD = self.all_reduce(part_TD.to(residual_TD.dtype).contiguous())
            found = self.ops.add_rms_norm(total_TD, residual_TD, weight_D, eps)
        return found
