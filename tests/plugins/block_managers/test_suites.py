"""The built-in block managers run the kit's suite."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

from nanoflow.testing import BlockManagerSuite
from nanoflow.testing.world import START, World, beginning, chain


class PlainWorld(World):
    """Every block is blank or has one owner."""

    def check_blocks(self, owners: Counter[int]) -> None:
        super().check_blocks(owners)
        blocks: Any = self.blocks
        assert max(owners.values(), default=1) == 1
        assert sorted([*blocks.free_blocks, *owners]) == list(range(blocks.num_blocks))


class PrefixWorld(World):
    """The books of the prefix cache balance."""

    def check_blocks(self, owners: Counter[int]) -> None:
        super().check_blocks(owners)
        manager: Any = self.blocks
        assert [block.ref_count for block in manager.blocks] == [owners[i] for i in range(manager.num_blocks)]
        assert sorted([*manager.blank, *manager.idle, *owners]) == list(range(manager.num_blocks))
        findable = {i for i, block in enumerate(manager.blocks) if block.key is not None}
        assert set(manager.cached.values()) == findable
        assert set(manager.idle) == findable - set(owners)
        for digest, block_id in manager.cached.items():
            assert manager.blocks[block_id].key.digest == digest


class TestPlain(BlockManagerSuite):
    component = "plain"
    shares_prefixes = False
    world = PlainWorld


class TestPrefix(BlockManagerSuite):
    component = "prefix"
    world = PrefixWorld
    num_steps = 10_000


class RadixWorld(World):
    """The tree is what its blocks hold, and the least recently used idle node is a leaf."""

    def check_blocks(self, owners: Counter[int]) -> None:
        super().check_blocks(owners)
        manager: Any = self.blocks
        nodes, seen, own = [(manager.root, START)], [], []
        while nodes:
            parent, digest = nodes.pop()
            for key, node in parent.children.items():
                assert (node.parent, node.key) == (parent, key)
                tokens, identity = key[: 8 * manager.block_size], key[8 * manager.block_size :]
                digests = [beginning(identity) if parent is manager.root else digest]
                for token in array("q", tokens):
                    digests.append(chain(digests[-1], token))
                assert self.cache[node.block_id] == digests[1:], f"block {node.block_id} holds other tokens"
                assert parent is manager.root or (parent.ref_count >= node.ref_count and not identity)
                nodes.append((node, digests[-1]))
                seen.append(node)
        for sequence, path in manager.paths.items():
            assert [node.block_id for node in path] == sequence.block_table[: len(path)]
            own += sequence.block_table[len(path) :]
        assert set(manager.idle) == {node for node in seen if node.ref_count == 0}
        assert all(node.ref_count == owners[node.block_id] for node in seen)
        assert sorted([*manager.blank, *own, *(node.block_id for node in seen)]) == list(range(manager.num_blocks))
        order = list(manager.idle)
        assert all(order.index(child) < order.index(node) for node in order for child in node.children.values())


class TestRadix(BlockManagerSuite):
    component = "radix"
    world = RadixWorld
