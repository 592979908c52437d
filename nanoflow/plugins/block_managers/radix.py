"""Prefix caching in a tree of blocks: a path from the root spells the tokens of a cached prefix.

The idea comes from SGLang's RadixAttention (NeurIPS 2024), here with one block a node. Tokens are compared, never
digests alone, and what was evicted leaves nothing behind that can't be reached.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field

from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions


@dataclass(eq=False, slots=True)
class Node:
    """A full block, findable from its parent.

    Attributes:
        block_id: -1 for the root.
        parent: None for the root, and for a node that was evicted.
        key: its tokens; behind those of a first block, what else the prefix must agree in (`cache_identity`).
        children: by their tokens.
        ref_count: sequences that hold it; its parent has at least as many.
    """

    block_id: int = -1
    parent: Node | None = None
    key: bytes = b""
    children: dict[bytes, Node] = field(default_factory=dict)
    ref_count: int = 0


class RadixBlockManager(BlockManager):
    """Shares committed blocks, and evicts the least recently used leaf.

    Attributes:
        blank: ids of blocks that are free and without content; taken from the end.
        idle: nodes that nobody holds, the least recently used first. A sequence lets go of its tail first, and whoever
            holds a block holds those before it, so a child always comes before its parent: the first one is a leaf.
        paths: for each sequence with blocks, the nodes that its first blocks are; the others are its own.
    """

    def __init__(self, config: NoOptions, context: BlockManagerContext) -> None:
        self.num_blocks = context.num_blocks
        self.block_size = context.block_size
        self.root = Node()
        self.blank = list(reversed(range(context.num_blocks)))
        self.idle: OrderedDict[Node, None] = OrderedDict()
        self.paths: dict[Sequence, list[Node]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.blank) + len(self.idle)

    def match(self, sequence: Sequence) -> int:
        return self._look_up(sequence, self._num_skippable_blocks(sequence)) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        table = sequence.block_table
        path: list[Node] = []
        if table:
            needed = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size) - len(table)
            if needed > self.num_free_blocks:
                return False
        else:
            needed = -(-num_tokens // self.block_size)  # shared blocks are full
            if needed > self.num_free_blocks:
                return False
            num_shared = self._look_up(sequence, self._num_skippable_blocks(sequence))
            path = sequence.prefix_match[:num_shared]
            # Whoever holds a block holds those before it, so the idle ones are the last of the path.
            num_idle = len(path) - bisect_left(path, True, key=lambda node: node.ref_count == 0)
            if needed > self.num_free_blocks - num_idle:
                return False
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += num_shared * self.block_size
            sequence.num_computed_tokens = num_shared * self.block_size
            sequence.prefix_match = None
            self.paths[sequence] = path
        for node in path:
            node.ref_count += 1
            self.idle.pop(node, None)
            table.append(node.block_id)
        for _ in range(needed):
            table.append(self.blank.pop() if self.blank else self._evict())
        return True

    def commit(self, sequence: Sequence) -> None:
        path = self.paths.get(sequence, [])  # it may have lost its blocks since the step was planned
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        if len(path) == num_full:
            return
        keys = self._keys(sequence, num_full)
        for index in range(len(path), num_full):
            parent = path[-1] if path else self.root
            if keys[index] in parent.children:
                return  # its twin is there; a block below that would not hold on to it
            node = Node(sequence.block_table[index], parent, keys[index], ref_count=1)
            parent.children[node.key] = node
            path.append(node)

    def free(self, sequence: Sequence) -> None:
        path = self.paths.pop(sequence, [])
        self.blank.extend(reversed(sequence.block_table[len(path) :]))
        for node in reversed(path):
            node.ref_count -= 1
            if node.ref_count == 0:
                self.idle[node] = None
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Tokens of the sequence's first `num_blocks` blocks, whose values must be known; at least so many."""
        keys: list[bytes] = sequence.prefix_keys
        for start in range(len(keys) * self.block_size, num_blocks * self.block_size, self.block_size):
            tokens = array("q", sequence.token_ids[start : start + self.block_size]).tobytes()
            keys.append(tokens if keys else tokens + sequence.cache_identity)
        return keys

    def _num_skippable_blocks(self, sequence: Sequence) -> int:
        """Leading blocks with known tokens, none of which the model must see again if the cache holds it."""
        return min(len(sequence.token_ids), sequence.num_skippable_tokens) // self.block_size

    def _look_up(self, sequence: Sequence, num_blocks: int) -> int:
        """How many of the sequence's first `num_blocks` blocks are cached; `Sequence.prefix_match` is their nodes.

        What was found before is kept but for its end, as far as that was evicted: a leaf goes before its parent.
        """
        path: list[Node] = sequence.prefix_match or []
        sequence.prefix_match = path
        while path and path[-1].parent is None:
            path.pop()
        keys = self._keys(sequence, num_blocks)
        node = path[-1] if path else self.root
        for index in range(len(path), num_blocks):
            child = node.children.get(keys[index])
            if child is None:
                break
            path.append(child)
            node = child
        return min(len(path), num_blocks)

    def _evict(self) -> int:
        """Take the block of the least recently used leaf."""
        leaf, _ = self.idle.popitem(last=False)
        assert not leaf.children
        assert leaf.parent is not None
        del leaf.parent.children[leaf.key]
        leaf.parent = None
        if self.on_evict is not None:
            self.on_evict(leaf.block_id)
        return leaf.block_id
