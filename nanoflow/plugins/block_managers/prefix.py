"""Prefix caching: sequences with a common prefix share its full blocks, which stay cached while nobody holds them.

Blocks that nobody holds are evicted in LRU order, the tail of a sequence first, as in vLLM's automatic prefix caching.
"""

from __future__ import annotations

from nanoflow.core.data.sequence import Sequence
from nanoflow.plugins.block_managers.prefix_cache import PrefixCache


class PrefixBlockManager(PrefixCache):
    """Shares committed blocks, and evicts those that nobody holds in LRU order, the tail of a sequence first."""

    @property
    def num_free_blocks(self) -> int:
        return len(self.blank) + len(self.idle)

    def match(self, sequence: Sequence) -> int:
        return self._num_cached_blocks(sequence) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        table = sequence.block_table
        shared: list[int] = []
        if table:
            needed = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size) - len(table)
            if needed <= 0:
                return True
            if needed > self.num_free_blocks:
                return False
        else:
            needed = -(-num_tokens // self.block_size)  # shared blocks are full
            if needed > self.num_free_blocks:
                return False
            if num_shared := self._num_cached_blocks(sequence):
                shared = sequence.prefix_match.path[:num_shared]
            if needed > self.num_free_blocks - sum(map(self.idle.__contains__, shared)):
                return False
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += num_shared * self.block_size
            sequence.num_computed_tokens = num_shared * self.block_size
            sequence.prefix_match = None
        for block_id in shared:
            self.idle.pop(block_id, None)
            self.blocks[block_id].ref_count += 1
        table += shared
        for _ in range(needed):
            block_id = self.blank.pop() if self.blank else self._evict()
            self.blocks[block_id].ref_count = 1
            table.append(block_id)
        return True

    def commit(self, sequence: Sequence) -> None:
        table = sequence.block_table
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        first = num_full
        while first > 0 and self.blocks[table[first - 1]].prefix_id == 0:
            first -= 1
        if first == num_full:
            return
        keys = self._keys(sequence, num_full)
        parent_id = self.blocks[table[first - 1]].prefix_id if first else 0
        for depth in range(first, num_full):
            parent_id = self._register(table[depth], keys[depth], parent_id, depth)

    def free(self, sequence: Sequence) -> None:
        for block_id in reversed(sequence.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.key is None:
                    block.prefix_id = 0
                    self.blank.append(block_id)
                else:
                    self.idle[block_id] = None
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def _num_cached_blocks(self, sequence: Sequence) -> int:
        """Leading blocks that are cached and that the model need not see again."""
        num_blocks = self._num_skippable_blocks(sequence)
        return self._look_up(sequence, num_blocks) if num_blocks else 0

    def _num_skippable_blocks(self, sequence: Sequence) -> int:
        """Leading blocks with known tokens, none of which the model must see again if the cache holds it."""
        return min(len(sequence.token_ids), sequence.num_skippable_tokens) // self.block_size
