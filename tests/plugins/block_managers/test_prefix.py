"""The prefix cache beyond what any block manager must do: what is evicted first, and what a digest is worth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.block_managers import prefix_cache
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager


def manager(num_blocks: int = 8, block_size: int = 2) -> PrefixBlockManager:
    return PrefixBlockManager(NoOptions(), BlockManagerContext(num_blocks, block_size))


def sequence(*token_ids: int) -> Sequence:
    return Sequence("r", list(token_ids), SamplingParams(), max_tokens=100)


def run(blocks: PrefixBlockManager, seq: Sequence) -> list[int]:
    """Compute all of the sequence's tokens; returns its blocks."""
    assert blocks.allocate(seq, seq.num_tokens - blocks.match(seq))
    seq.num_computed_tokens = seq.num_tokens
    blocks.commit(seq)
    return list(seq.block_table)


def cached(blocks: PrefixBlockManager, *token_ids: int) -> int:
    """How many of these tokens the cache holds; one more token stands for what follows."""
    return blocks.match(sequence(*token_ids, 99))


def test_eviction_takes_the_tail_first() -> None:
    blocks = manager(num_blocks=5)
    seq = sequence(1, 2, 3, 4, 5, 6, 7, 8)
    run(blocks, seq)
    blocks.free(seq)
    left = []
    for new in range(10, 14):
        run(blocks, sequence(new, new))
        left.append(cached(blocks, 1, 2, 3, 4, 5, 6, 7, 8))
    assert left == [8, 6, 4, 2], "blank blocks go first, then the cached ones from the end"


def test_eviction_takes_the_least_recently_used() -> None:
    blocks = manager(num_blocks=6)
    old, middle, new = sequence(1, 1, 1, 1), sequence(2, 2, 2, 2), sequence(3, 3, 3, 3)
    for seq in (old, middle, new):
        run(blocks, seq)
        blocks.free(seq)
    again = sequence(1, 1, 1, 1, 1)
    assert blocks.allocate(again, 1)  # takes the tail of `middle`, now the least recently used
    assert [cached(blocks, t, t, t, t) for t in (1, 2, 3)] == [4, 2, 4]
    blocks.free(again)
    left = []
    while blocks.num_free_blocks:
        run(blocks, sequence(50, 50 + blocks.num_free_blocks))
        left.append([cached(blocks, t, t, t, t) for t in (1, 2, 3)])
    assert left == [[4, 2, 4], [4, 0, 4], [4, 0, 2], [4, 0, 0], [2, 0, 0], [0, 0, 0]]


def test_a_child_is_not_found_once_its_parent_was_evicted_and_came_back_different(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every digest equal, only the comparison of tokens and parents tells prompts apart."""
    monkeypatch.setattr(prefix_cache, "xxhash", SimpleNamespace(xxh3_64_intdigest=lambda data: 1))
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4))
    for tokens in ([1, 2, 3, 4], [3, 4], [1, 2], [3, 4, 1, 2], [3, 4, 3, 4]):
        found = cached(blocks, *tokens)
        assert found in (0, 2)
        assert found == 0 or tokens[:2] == [1, 2]
