"""A pool of blocks and nothing else: the smallest block manager that can serve."""

from __future__ import annotations

from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions


class PlainBlockManager(BlockManager):
    """Every block belongs to at most one sequence, and is blank once that sequence lets go of it."""

    def __init__(self, config: NoOptions, context: BlockManagerContext) -> None:
        self.num_blocks = context.num_blocks
        self.block_size = context.block_size
        self.free_blocks = list(reversed(range(context.num_blocks)))  # taken from the end

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    def match(self, sequence: Sequence) -> int:
        return 0

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        needed = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size) - len(sequence.block_table)
        if needed > len(self.free_blocks):
            return False
        for _ in range(needed):
            sequence.block_table.append(self.free_blocks.pop())
        return True

    def commit(self, sequence: Sequence) -> None:
        pass

    def free(self, sequence: Sequence) -> None:
        self.free_blocks.extend(reversed(sequence.block_table))
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
