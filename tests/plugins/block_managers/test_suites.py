"""The built-in block managers run the kit's suite."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nanoflow.testing import BlockManagerSuite
from nanoflow.testing.world import World


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
