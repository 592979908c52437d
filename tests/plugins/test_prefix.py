"""The prefix cache block by block: what is found, what is shared, and what is evicted first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanoflow.core.config import SamplingParams
from nanoflow.core.interfaces import BlockManagerContext, NoOptions
from nanoflow.core.types import Sequence
from nanoflow.plugins.block_managers import prefix
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


def test_full_blocks_are_found() -> None:
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4, 5))
    assert [cached(blocks, *[1, 2, 3, 4, 5, 6][:count]) for count in range(7)] == [0, 0, 2, 2, 4, 4, 4]
    assert cached(blocks, 1, 3) == cached(blocks, 3, 4) == cached(blocks, 2, 1) == 0
    assert cached(blocks, 1, 2, 4, 3) == 2


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4))
    assert blocks.match(sequence(1, 2, 3, 4)) == 2
    assert blocks.match(sequence(1, 2)) == 0
    assert blocks.match(sequence(1, 2, 3)) == 2


def test_what_is_still_to_be_scored_is_not_taken_from_the_cache() -> None:
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4, 5, 6))
    scored = Sequence("r", [1, 2, 3, 4, 5, 6, 7], SamplingParams(prompt_logprobs=0), max_tokens=100)
    found = [blocks.match(scored)]
    for position in range(1, 7):
        scored.add_logprobs(position, [{}])
        found.append(blocks.match(scored))
    assert found == [0, 0, 2, 2, 4, 4, 6]


def test_live_sequences_share_blocks() -> None:
    blocks = manager()
    first, second = sequence(1, 2, 3, 4, 5), sequence(1, 2, 3, 4, 6, 7)
    table = run(blocks, first)
    assert run(blocks, second)[:2] == table[:2]
    assert second.block_table[2] != table[2]
    assert blocks.num_free_blocks == 8 - 4
    blocks.free(first)
    assert blocks.num_free_blocks == 8 - 3
    assert (first.block_table, first.num_computed_tokens) == ([], 0)
    blocks.free(second)
    assert blocks.num_free_blocks == 8
    assert cached(blocks, 1, 2, 3, 4, 6, 7) == 6


def test_counters() -> None:
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4, 5))
    run(blocks, sequence(1, 2, 3, 4, 6, 7))
    assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == (11, 4)


def test_blocks_with_unknown_values_are_not_found() -> None:
    """A token in flight fills a block whose content the host doesn't know yet."""
    blocks = manager()
    seq = sequence(1, 2, 3)
    assert blocks.allocate(seq, 3)
    assert seq.advance(3)
    blocks.commit(seq)
    assert blocks.allocate(seq, 1)
    assert seq.advance(1)
    blocks.commit(seq)
    assert cached(blocks, 1, 2, 3, 4) == 2
    seq.append_token(4)
    blocks.commit(seq)
    assert cached(blocks, 1, 2, 3, 4) == 4


def test_allocate_changes_nothing_when_it_fails() -> None:
    blocks = manager(num_blocks=4)
    run(blocks, sequence(1, 2, 3))
    seq = sequence(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert not blocks.allocate(seq, 8)
    assert (seq.block_table, seq.num_computed_tokens, blocks.num_free_blocks) == ([], 0, 2)
    assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == (3, 0)
    assert blocks.allocate(seq, 4)
    assert (seq.num_computed_tokens, blocks.num_free_blocks) == (2, 0)
    seq.num_computed_tokens = 6
    assert not blocks.allocate(seq, 1)
    assert len(seq.block_table) == 3


def test_idle_blocks_that_are_shared_do_not_count_as_free() -> None:
    blocks = manager(num_blocks=3)
    seq = sequence(1, 2, 3, 4)
    run(blocks, seq)
    blocks.free(seq)
    longer = sequence(1, 2, 3, 4, 5, 6, 7)
    assert blocks.num_free_blocks == 3
    assert not blocks.allocate(longer, 3), "two of the three free blocks are the ones that it shares"
    assert blocks.allocate(longer, 2)


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


def test_blocks_in_use_are_never_evicted() -> None:
    blocks = manager(num_blocks=4)
    held = run(blocks, sequence(1, 2, 3, 4))
    for new in range(10, 20):
        seq = sequence(new, new, new, new)
        assert not set(run(blocks, seq)) & set(held)
        blocks.free(seq)
    assert cached(blocks, 1, 2, 3, 4) == 4


def test_twins_computed_side_by_side() -> None:
    """Two sequences that filled equal blocks before either could share: one block is findable, none is lost."""
    blocks = manager()
    first, second = sequence(1, 2, 3, 4), sequence(1, 2, 3, 4)
    for seq in (first, second):
        assert blocks.allocate(seq, 4)
    for seq in (first, second):
        seq.num_computed_tokens = 4
        blocks.commit(seq)
    assert len(blocks.cached) == 2
    assert not set(first.block_table) & set(second.block_table)
    third = sequence(1, 2, 3, 4, 5)
    assert run(blocks, third)[:2] == first.block_table
    for seq in (first, third, second):
        blocks.free(seq)
    assert blocks.num_free_blocks == 8
    assert cached(blocks, 1, 2, 3, 4) == 4


def test_a_child_is_not_found_once_its_parent_was_evicted_and_came_back_different(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every digest equal, only the comparison of tokens and parents tells prompts apart."""
    monkeypatch.setattr(prefix, "xxhash", SimpleNamespace(xxh3_64_intdigest=lambda data: 1))
    blocks = manager()
    run(blocks, sequence(1, 2, 3, 4))
    for tokens in ([1, 2, 3, 4], [3, 4], [1, 2], [3, 4, 1, 2], [3, 4, 3, 4]):
        found = cached(blocks, *tokens)
        assert found in (0, 2)
        assert found == 0 or tokens[:2] == [1, 2]


def test_same_block_under_two_parents() -> None:
    blocks = manager()
    run(blocks, sequence(1, 1, 7, 7))
    assert cached(blocks, 2, 2, 7, 7) == 0
    assert cached(blocks, 7, 7) == 0
    run(blocks, sequence(2, 2, 7, 7))
    assert cached(blocks, 1, 1, 7, 7) == cached(blocks, 2, 2, 7, 7) == 4
