"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): which part of a tensor a rank has, and how parts are combined.

Layers take a `ParallelContext`. They split their parameters by it and combine their results through it, so that models
need no code of their own. With one rank every method is the identity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nanoflow.core.config.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Share(NamedTuple):
    """The part of a dim that a rank has: `length` of `total` entries, from `start` on."""

    start: int
    length: int
    total: int

    def times(self, unit: int) -> Share:
        """The same part, counted in entries of which each one here has `unit`."""
        return Share(self.start * unit, self.length * unit, self.total * unit)


class Shard(NamedTuple):
    """A parameter, or a view of one, that holds a part of a checkpoint tensor.

    Attributes:
        target: what is filled; all dims but one are as in the checkpoint.
        dim: the one that is split.
        share: which part of it.
    """

    target: torch.Tensor
    dim: int
    share: Share

    @property
    def whole_shape(self) -> list[int]:
        """The checkpoint tensor's."""
        shape = list(self.target.shape)
        shape[self.dim] = self.share.total
        return shape

    @property
    def index(self) -> tuple[slice, ...]:
        """What picks this part out of the checkpoint tensor."""
        start, length, _ = self.share
        return (slice(None),) * self.dim + (slice(start, start + length),)


class RankLost(RuntimeError):
    """Another rank ended while this one exchanged something with it; that one's cause is what counts."""


class Group(ABC):
    """How ranks exchange tensors. All of them call the same methods in the same order, with the same shapes."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, with the same bits on each of them. May overwrite `x`, which is contiguous."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' `x`, one after the other along the last dim; contiguous."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x` with that of rank 0."""

    def fuses_norm(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        """Whether a sum [num_rows, size] that a norm follows is best left to `allreduce_add_norm`. All ranks agree."""
        return False

    def allreduce_add_norm(
        self, x: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The RMS norm of `residual_TD` + the sum of all ranks' `x`, and that sum, which may overwrite the residual.

        Called only where `fuses_norm` agrees. Results are rounded to the residual's dtype where separate steps would
        do it: each rank's `x`, their sum, and the new residual.

        Args:
            x: [T, D]; or [C, T, D], C partials of it.
            residual_TD: with the same bits on all ranks.
            weight_D: the norm's factors.
            eps: added to the mean square.
        """
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 (nothing to do by default)
        """Leave the group, at once and whatever is still under way."""


class RankPartials(NamedTuple):
    """A layer's result that ranks have yet to add up. `RMSNorm.add` takes it, with which the sum is made.

    Attributes:
        part: this rank's, as `Group.allreduce_add_norm` takes it.
        group: of the ranks.
    """

    part: torch.Tensor
    group: Group


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place among those that share a model.

    Attributes:
        rank: from 0.
        size: how many there are.
        group: to the others; None if there are none.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None

    def share(self, total: int, what: str) -> Share:
        """This rank's part of something that is split evenly.

        Args:
            total: how many there are of it.
            what: its name in the plural, for the error.

        Raises:
            ConfigError: it can't be split so.
        """
        if total % self.size:
            raise ConfigError(self._refusal(total, what))
        length = total // self.size
        return Share(self.rank * length, length, total)

    def share_kv_heads(self, num_kv_heads: int) -> Share:
        """This rank's KV heads; where there are more ranks than heads, several ranks have the same one.

        Raises:
            ConfigError: neither number is a multiple of the other.
        """
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads, "KV heads")
        if self.size % num_kv_heads:
            raise ConfigError(self._refusal(num_kv_heads, "KV heads"))
        return Share(self.rank * num_kv_heads // self.size, 1, num_kv_heads)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """As `Group.all_reduce`."""
        return x if self.group is None else self.group.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """As `Group.all_gather`."""
        return x if self.group is None else self.group.all_gather(x)

    def fuses_norm(self, num_rows: int, size: int, dtype: torch.dtype) -> bool:
        """As `Group.fuses_norm`."""
        return self.group is not None and self.group.fuses_norm(num_rows, size, dtype)

    def partials(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | RankPartials:
        """The sum of all ranks' parts, [T, D] or C partials [C, T, D], or what `RMSNorm.add` adds up to it.

        `dtype` is the residual's.
        """
        if self.size == 1:
            return part
        if self.fuses_norm(*part.shape[-2:], dtype):
            return RankPartials(part, self.group)
        return self.all_reduce(part if part.dim() == 2 else part.sum(0))

    def broadcast(self, x: torch.Tensor) -> None:
        """As `Group.broadcast`."""
        if self.group is not None:
            self.group.broadcast(x)

    def _refusal(self, total: int, what: str) -> str:
        fitting = [size for size in range(1, self.size) if total % size == 0]
        return (
            f"engine.tensor_parallel_size is {self.size}, but the model's {total} {what} can't be split evenly over so "
            f"many ranks; {fitting[-1]} would do for them."
        )


SINGLE_RANK = ParallelContext()  # the only rank
