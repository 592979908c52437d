"""The contract of a block manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from nanoflow.core.data.sequence import Sequence


@dataclass(frozen=True)
class BlockManagerContext:
    """What a block manager is built from: `num_blocks` blocks with ids from 0, of `block_size` tokens each."""

    num_blocks: int
    block_size: int


class BlockManager(ABC):
    """Owns the blocks of the KV cache: who has which, and which hold prefixes worth keeping.

    It deals in block ids and never touches the cache itself. The scheduler calls it, and nobody else.

    Attributes:
        num_blocks: blocks in all.
        block_size: P, tokens in a block.
        num_queried_tokens: tokens of admitted sequences that were looked up in the prefix cache.
        num_hit_tokens: how many of those were found.
        on_evict: called with the id of each block whose content could be found and can't be found any more, once, when
            that happens; it must not call back. None, the default: nobody wants to know. Set by the engine.
    """

    num_blocks: int
    block_size: int
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    on_evict: Callable[[int], None] | None = None

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones that nobody uses included."""

    @abstractmethod
    def match(self, sequence: Sequence) -> int:
        """How many leading tokens of `sequence` the cache holds: a multiple of P, at most
        `sequence.num_skippable_tokens`.

        The tokens after these are left to compute even if the cache holds them, since their logits are needed; the last
        one is always among them. Changes nothing that can be seen. 0 for a manager without a prefix cache.

        Blocks are found only by sequences with the same `Sequence.cache_identity` as the one that filled them.
        A waiting sequence is asked about in every step: what was found must not be looked up again, block by block.
        """

    @abstractmethod
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` blocks for its computed tokens and `num_tokens` more, or change nothing and return False.

        For a sequence without blocks this is admission: it first takes the blocks that `match` found, and sets
        `sequence.num_computed_tokens` to their tokens. Appends to `sequence.block_table`.
        """

    @abstractmethod
    def commit(self, sequence: Sequence) -> None:
        """Note that keys and values of `sequence`'s computed tokens are in its blocks, or will be before any step
        submitted later reads them. Full blocks whose token values are known may be shared from now on."""

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of `sequence`: empties its `block_table` and sets `num_computed_tokens` to 0.

        Blocks that were committed may be kept for later matches until they are needed.
        """
