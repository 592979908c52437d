"""Cached prefixes: full blocks stay findable by the tokens they hold, and are looked up, registered and forgotten here.

The idea of hashing blocks in a chain comes from vLLM's automatic prefix caching. A hash only finds a candidate: a block
is shared when the tokens themselves, and the identity of the block before it, agree too, so that no collision can mix
two prompts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import xxhash

from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions

NUM_REMEMBERED = 1024  # blocks that were forgotten last; who was not asked about for longer is looked up anew


class Key(NamedTuple):
    """What a full block is looked up by.

    Attributes:
        digest: covers its tokens and all before them.
        tokens: its own; behind those of a first block, what else the prefix must agree in (`cache_identity`).
    """

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
        depth: how many blocks come before it.
    """

    ref_count: int = 0
    key: Key | None = None
    prefix_id: int = 0
    parent_id: int = 0
    depth: int = 0


@dataclass(slots=True)
class Match:
    """What was found of a waiting sequence's prefix.

    Attributes:
        path: ids of the blocks in order.
        num_forgotten: `PrefixCache.num_forgotten` when it was last looked at.
    """

    path: list[int]
    num_forgotten: int


class PrefixCache(BlockManager):
    """The blocks, and which of them hold which prefix: what `PrefixBlockManager` hands out and takes back.

    Attributes:
        blocks: by id.
        blank: ids of blocks that are free and without content; taken from the end.
        idle: ids of blocks that are free but findable, least recently used first.
        cached: ids of findable blocks, by digest.
        num_forgotten: how often a block became unfindable.
        forgotten: id and depth of the last blocks of these.
    """

    def __init__(self, config: NoOptions, context: BlockManagerContext) -> None:
        self.num_blocks = context.num_blocks
        self.block_size = context.block_size
        self.blocks = [Block() for _ in range(context.num_blocks)]
        self.blank = list(reversed(range(context.num_blocks)))
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.cached: dict[int, int] = {}
        self.num_forgotten = 0
        self.forgotten: deque[tuple[int, int]] = deque(maxlen=NUM_REMEMBERED)
        self.prefix_ids = count(1)

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[Key]:
        """Keys of the sequence's first `num_blocks` blocks, whose token values must be known; at least so many."""
        keys: list[Key] = sequence.prefix_keys
        for index in range(len(keys), num_blocks):
            start = index * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size]).tobytes()
            parent = keys[-1].digest.to_bytes(8, "little") if keys else b""
            if not keys:
                tokens += sequence.cache_identity
            keys.append(Key(xxhash.xxh3_64_intdigest(parent + tokens), tokens))
        return keys

    def _look_up(self, sequence: Sequence, num_blocks: int) -> int:
        """How many of the sequence's first `num_blocks` blocks are cached; `Sequence.prefix_match` says which.

        What was found before is looked up again only as far as blocks were forgotten since.
        """
        found = sequence.prefix_match
        if found is None:
            found = sequence.prefix_match = Match([], self.num_forgotten)
        self._drop_forgotten(found)
        path = found.path
        keys = self._keys(sequence, num_blocks)
        parent_id = self.blocks[path[-1]].prefix_id if path else 0
        for index in range(len(path), num_blocks):
            block_id = self._find(keys[index], parent_id)
            if block_id is None:
                break
            path.append(block_id)
            parent_id = self.blocks[block_id].prefix_id
        return min(len(path), num_blocks)

    def _drop_forgotten(self, found: Match) -> None:
        """Cut a match before its first block that was forgotten since."""
        num_new = self.num_forgotten - found.num_forgotten
        found.num_forgotten = self.num_forgotten
        if num_new > len(self.forgotten):
            found.path.clear()
            return
        path = found.path
        for block_id, depth in islice(reversed(self.forgotten), num_new):
            if depth < len(path) and path[depth] == block_id:
                del path[depth:]

    def _find(self, key: Key, parent_id: int) -> int | None:
        block_id = self.cached.get(key.digest)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block_id if block.key == key and block.parent_id == parent_id else None

    def _register(self, block_id: int, key: Key, parent_id: int, depth: int) -> int:
        """Make a full block findable, unless its twin is; returns the id of the prefix that it ends."""
        block = self.blocks[block_id]
        twin = self._find(key, parent_id)
        if twin is not None:
            block.prefix_id = self.blocks[twin].prefix_id
            return block.prefix_id
        if key.digest in self.cached:  # a collision, or a block whose parent was evicted: it can't be found any more
            self._forget(self.cached[key.digest])
        block.key, block.parent_id, block.prefix_id, block.depth = key, parent_id, next(self.prefix_ids), depth
        self.cached[key.digest] = block_id
        return block.prefix_id

    def _forget(self, block_id: int) -> None:
        """Make a block unfindable, and blank if nobody holds it."""
        block = self.blocks[block_id]
        assert block.key is not None
        del self.cached[block.key.digest]
        block.key = None
        self.num_forgotten += 1
        self.forgotten.append((block_id, block.depth))
        if self.on_evict is not None:
            self.on_evict(block_id)
        if block_id in self.idle:
            del self.idle[block_id]
            block.prefix_id = 0
            self.blank.append(block_id)

    def _evict(self) -> int:
        """Make the least recently used idle block blank, and take it."""
        block_id = next(iter(self.idle))
        self._forget(block_id)
        return self.blank.pop()
