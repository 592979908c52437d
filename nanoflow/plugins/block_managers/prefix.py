"""Prefix caching: full blocks stay findable by the tokens they hold, and sequences with a common prefix share them.

The idea of hashing blocks in a chain comes from vLLM's automatic prefix caching; that of freeing the tail first from
its LRU eviction. A hash only finds a candidate: a block is shared when the tokens themselves, and the identity of the
block before it, agree too, so that no collision can mix two prompts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import xxhash

from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions


class Key(NamedTuple):
    """What a full block is looked up by: `digest` covers its tokens and all before them; `tokens` are its own."""

    digest: int
    tokens: bytes


@dataclass(slots=True)
class Block:
    """A block's place in the tree of cached prefixes.

    Attributes:
        ref_count: sequences that hold it.
        key: None while it is blank, being filled, or no longer worth finding.
        prefix_id: stands for its tokens and all before them; equal ids mean equal prefixes.
        parent_id: `prefix_id` of the block before it, 0 for a first block.
    """

    ref_count: int = 0
    key: Key | None = None
    prefix_id: int = 0
    parent_id: int = 0


class PrefixBlockManager(BlockManager):
    """Shares committed blocks, and evicts those that nobody holds in LRU order, the tail of a sequence first."""

    def __init__(self, config: NoOptions, context: BlockManagerContext) -> None:
        self.num_blocks = context.num_blocks
        self.block_size = context.block_size
        self.blocks = [Block() for _ in range(context.num_blocks)]
        self.blank = list(reversed(range(context.num_blocks)))  # free and without content; taken from the end
        self.idle: OrderedDict[int, None] = OrderedDict()  # free but findable, least recently used first
        self.cached: dict[int, int] = {}  # digest -> block id
        self.prefix_ids = count(1)

    @property
    def num_free_blocks(self) -> int:
        return len(self.blank) + len(self.idle)

    def match(self, sequence: Sequence) -> int:
        return len(self._cached_prefix(sequence)) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        table = sequence.block_table
        if table:
            shared: list[int] = []
            needed = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size) - len(table)
            if needed <= 0:
                return True
            if needed > self.num_free_blocks:
                return False
        else:
            shared = self._cached_prefix(sequence)
            needed = -(-num_tokens // self.block_size)  # shared blocks are full
            if needed > self.num_free_blocks - sum(block_id in self.idle for block_id in shared):
                return False
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += len(shared) * self.block_size
            sequence.num_computed_tokens = len(shared) * self.block_size
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
        for block_id, key in zip(table[first:num_full], keys[first:num_full], strict=True):
            parent_id = self._register(block_id, key, parent_id)

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

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[Key]:
        """Keys of the sequence's first `num_blocks` blocks, whose token values must be known; at least so many."""
        keys: list[Key] = sequence.prefix_keys
        for index in range(len(keys), num_blocks):
            start = index * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size]).tobytes()
            parent = keys[-1].digest.to_bytes(8, "little") if keys else b""
            keys.append(Key(xxhash.xxh3_64_intdigest(parent + tokens), tokens))
        return keys

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Ids of cached blocks that hold the sequence's first tokens, none of which the model must see again."""
        num_blocks = min(len(sequence.token_ids), sequence.num_skippable_tokens) // self.block_size
        found: list[int] = []
        parent_id = 0
        for key in self._keys(sequence, num_blocks)[:num_blocks]:
            block_id = self._find(key, parent_id)
            if block_id is None:
                break
            found.append(block_id)
            parent_id = self.blocks[block_id].prefix_id
        return found

    def _find(self, key: Key, parent_id: int) -> int | None:
        block_id = self.cached.get(key.digest)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block_id if block.key == key and block.parent_id == parent_id else None

    def _register(self, block_id: int, key: Key, parent_id: int) -> int:
        """Make a full block findable, unless its twin is; returns the id of the prefix that it ends."""
        block = self.blocks[block_id]
        twin = self._find(key, parent_id)
        if twin is not None:
            block.prefix_id = self.blocks[twin].prefix_id
            return block.prefix_id
        if key.digest in self.cached:  # a collision, or a block whose parent was evicted: it can't be found any more
            self._forget(self.cached[key.digest])
        block.key, block.parent_id, block.prefix_id = key, parent_id, next(self.prefix_ids)
        self.cached[key.digest] = block_id
        return block.prefix_id

    def _forget(self, block_id: int) -> None:
        block = self.blocks[block_id]
        assert block.key is not None
        del self.cached[block.key.digest]
        block.key = None
        if block_id in self.idle:
            del self.idle[block_id]
            block.prefix_id = 0
            self.blank.append(block_id)

    def _evict(self) -> int:
        """Make the least recently used idle block blank, and take it."""
        block_id = next(iter(self.idle))
        self._forget(block_id)
        return self.blank.pop()
