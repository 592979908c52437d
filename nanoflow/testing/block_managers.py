"""What every block manager must do, with a prefix cache or without."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.core.config.engine_config import PluginChoice
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.testing.loads import KIT, MakeWorld, collisions, drive, explore
from nanoflow.testing.schedulers import both_depths, world_maker
from nanoflow.testing.suite import Suite
from nanoflow.testing.world import World

SIZES = [1, 2, 4, 16]


class BlockManagerSuite(Suite):
    """The block manager by itself, and below the scheduler `fcfs`.

    Attributes:
        shares_prefixes: whether it has a prefix cache, which is then tested; if not, `match` must find nothing.
        num_steps: steps of each random load.
        world: may add what this block manager promises beyond the interface.
    """

    role = "block_manager"
    shares_prefixes: ClassVar[bool] = True
    num_steps: ClassVar[int] = 3_000
    world: ClassVar[type[World]] = World

    @classmethod
    def build(cls, num_blocks: int = 8, block_size: int = 2) -> BlockManager:
        """The block manager under test, empty."""
        component, config = cls.plugin()
        return component.build(config, BlockManagerContext(num_blocks, block_size))

    @classmethod
    def maker(cls) -> MakeWorld:
        """What makes worlds with this block manager."""
        cls.plugin()
        return world_maker(cls.registry(), PluginChoice("fcfs"), cls.choice(), cls.world)

    @both_depths
    def test_random_loads(self, depth: int) -> None:
        """Every sequence finds its own tokens in its blocks; all blocks come back in the end."""
        counts = drive(self.maker(), random.Random(depth), depth, self.num_steps)
        assert min(counts[what] for what in ("preemptions", "aborts", "ends")) > 0
        assert (counts["hits"] > 0) == self.shares_prefixes

    def test_any_calls(self) -> None:
        """In the hands of hypothesis, which shows the shortest way to what fails."""
        explore(self.maker(), max_examples=40)

    @both_depths
    def test_collisions_never_mix_prompts(self, depth: int) -> None:
        """Whatever it hashes has one of three digests, and still every sequence finds its own tokens."""
        with collisions(sys.modules[type(self.build()).__module__]):
            drive(self.maker(), random.Random(depth), depth, self.num_steps)

    @pytest.mark.parametrize("block_size", SIZES)
    def test_blocks_for_tokens(self, block_size: int) -> None:
        """As many as the tokens need, token by token; those that are there already stay where they are."""
        blocks = self.build(num_blocks=5, block_size=block_size)
        sequence = sequence_of(range(5 * block_size))
        assert blocks.num_free_blocks == 5
        for count in range(1, 5 * block_size + 1):
            before = list(sequence.block_table)
            assert blocks.allocate(sequence, 1)
            sequence.num_computed_tokens = count
            needed = -(-count // block_size)
            assert len(sequence.block_table) == needed, f"{count} tokens in blocks of {block_size}"
            assert sequence.block_table[: len(before)] == before
            assert blocks.num_free_blocks == 5 - needed
        assert sorted(sequence.block_table) == list(range(5))
        blocks.free(sequence)
        assert (sequence.block_table, sequence.num_computed_tokens, blocks.num_free_blocks) == ([], 0, 5)

    @pytest.mark.parametrize("block_size", SIZES)
    def test_no_block_has_two_owners(self, block_size: int) -> None:
        blocks = self.build(num_blocks=6, block_size=block_size)
        sequences = [sequence_of([token] * 2 * block_size) for token in range(3)]
        for sequence in sequences:
            run(blocks, sequence)
        assert blocks.num_free_blocks == 0
        assert sorted(block for sequence in sequences for block in sequence.block_table) == list(range(6))

    def test_a_refusal_changes_nothing(self) -> None:
        blocks = self.build(num_blocks=4, block_size=2)
        held = sequence_of([1, 2, 3, 4, 5])
        run(blocks, held)
        newcomer = sequence_of([7, 8, 9])
        for sequence, num_tokens in ((newcomer, 3), (held, 4)):
            before = list(sequence.block_table), sequence.num_computed_tokens, blocks.num_free_blocks
            counted = blocks.num_queried_tokens, blocks.num_hit_tokens
            assert not blocks.allocate(sequence, num_tokens)
            assert (list(sequence.block_table), sequence.num_computed_tokens, blocks.num_free_blocks) == before
            assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == counted
        assert blocks.allocate(held, 3), "one block is free, and one place in the last of its own"
        assert blocks.num_free_blocks == 0

    def test_a_refusal_does_not_touch_what_it_would_share(self) -> None:
        """Shared blocks that nobody holds are free ones as well, and can't be had twice."""
        blocks = self.build(num_blocks=3, block_size=2)
        first = sequence_of([1, 2, 3, 4])
        run(blocks, first)
        blocks.free(first)
        longer = sequence_of([1, 2, 3, 4, 5, 6, 7])
        found = blocks.match(longer)
        assert not blocks.allocate(longer, 7 - found + 1)
        assert (longer.block_table, longer.num_computed_tokens, blocks.num_free_blocks) == ([], 0, 3)
        assert blocks.match(longer) == found
        assert blocks.allocate(longer, 6 - found)

    @pytest.mark.parametrize("block_size", SIZES)
    def test_every_free_block_can_be_had(self, block_size: int) -> None:
        """Cached ones, too, which are evicted for it, until there is none."""
        blocks = self.build(num_blocks=6, block_size=block_size)
        for token in range(4):  # fill the cache with what somebody might come back for
            sequence = sequence_of([token] * 3 * block_size)
            run(blocks, sequence)
            blocks.free(sequence)
        assert blocks.num_free_blocks == 6
        held = []
        for token in range(6):
            held.append(sequence_of([10 + token] * block_size))
            run(blocks, held[-1])
            assert blocks.num_free_blocks == 5 - token
        assert not blocks.allocate(sequence_of([99]), 1)
        assert sorted(block for sequence in held for block in sequence.block_table) == list(range(6))

    def test_held_blocks_are_never_evicted(self) -> None:
        blocks = self.build(num_blocks=4, block_size=2)
        held = sequence_of([1, 2, 3, 4])
        run(blocks, held)
        for token in range(10, 20):
            sequence = sequence_of([token] * 4)
            run(blocks, sequence)
            assert not set(sequence.block_table) & set(held.block_table)
            blocks.free(sequence)
        assert blocks.match(sequence_of([1, 2, 3, 4, 99])) == (4 if self.shares_prefixes else 0)

    def test_full_blocks_are_found(self) -> None:
        """By sequences that begin with their tokens, while somebody holds them and after; parts of blocks are not."""
        blocks = self.build(num_blocks=8, block_size=2)
        first = sequence_of([1, 2, 3, 4, 5])
        run(blocks, first)
        for _ in range(2):
            found = [blocks.match(sequence_of([*[1, 2, 3, 4, 5, 6][:count], 99])) for count in range(7)]
            assert found == ([0, 0, 2, 2, 4, 4, 4] if self.shares_prefixes else [0] * 7)
            for other in ([1, 3], [3, 4], [2, 1], [1, 2, 4, 3]):
                expected = 2 if self.shares_prefixes and other[:2] == [1, 2] else 0
                assert blocks.match(sequence_of([*other, 99])) == expected
            if first.block_table:
                blocks.free(first)

    def test_equal_blocks_after_different_ones(self) -> None:
        """A block holds its tokens after those before them: found after the same ones alone."""
        blocks = self.build(num_blocks=8, block_size=2)
        run(blocks, sequence_of([1, 1, 7, 7]))
        assert blocks.match(sequence_of([2, 2, 7, 7, 99])) == blocks.match(sequence_of([7, 7, 99])) == 0
        run(blocks, sequence_of([2, 2, 7, 7]))
        for token in (1, 2):
            assert blocks.match(sequence_of([token, token, 7, 7, 99])) == (4 if self.shares_prefixes else 0)

    def test_tokens_whose_logits_are_needed_are_computed(self) -> None:
        """The last token, and those of a prompt that is scored, are never taken from the cache."""
        blocks = self.build(num_blocks=8, block_size=2)
        run(blocks, sequence_of([1, 2, 3, 4, 5, 6]))
        lengths = [blocks.match(sequence_of([1, 2, 3, 4, 5, 6][:count])) for count in range(1, 7)]
        assert lengths == ([0, 0, 2, 2, 4, 4] if self.shares_prefixes else [0] * 6)
        scored = Sequence("r", [1, 2, 3, 4, 5, 6, 7], SamplingParams(prompt_logprobs=0), max_tokens=100)
        assert blocks.match(scored) == 0
        scored.add_logprobs(1, [{}] * 4)
        assert blocks.match(scored) == (4 if self.shares_prefixes else 0)

    def test_only_committed_blocks_are_found(self) -> None:
        blocks = self.build(num_blocks=8, block_size=2)
        first = sequence_of([1, 2, 3, 4])
        assert blocks.allocate(first, 4)
        first.num_computed_tokens = 4
        assert blocks.match(sequence_of([1, 2, 3, 4, 5])) == 0
        blocks.free(first)
        assert blocks.match(sequence_of([1, 2, 3, 4, 5])) == 0

    def test_a_token_in_flight_is_not_committed(self) -> None:
        """Its value is not known; its block is found once it is."""
        blocks = self.build(num_blocks=8, block_size=2)
        first = sequence_of([1, 2, 3])
        run(blocks, first)
        first.num_in_flight = 1
        assert blocks.allocate(first, 1)
        first.num_computed_tokens = 4
        blocks.commit(first)
        assert blocks.match(sequence_of([1, 2, 3, 4, 5])) == (2 if self.shares_prefixes else 0)
        first.append_token(4)
        blocks.commit(first)
        assert blocks.match(sequence_of([1, 2, 3, 4, 5])) == (4 if self.shares_prefixes else 0)

    def test_twins_computed_side_by_side(self) -> None:
        """Two that filled equal blocks before either could share: neither loses its own, and a third finds them."""
        blocks = self.build(num_blocks=8, block_size=2)
        twins = [sequence_of([1, 2, 3, 4]) for _ in range(2)]
        for sequence in twins:
            assert blocks.allocate(sequence, 4)
        for sequence in twins:
            sequence.num_computed_tokens = 4
            blocks.commit(sequence)
        assert not set(twins[0].block_table) & set(twins[1].block_table)
        third = sequence_of([1, 2, 3, 4, 5])
        run(blocks, third)
        for sequence in (twins[0], third, twins[1]):
            blocks.free(sequence)
        assert blocks.num_free_blocks == 8
        assert blocks.match(sequence_of([1, 2, 3, 4, 5])) == (4 if self.shares_prefixes else 0)

    def test_identities_share_nothing(self) -> None:
        """Equal prefixes are found only by sequences with the same `cache_identity`, whoever came first."""
        identities = [b"", b"a", b"b", (1).to_bytes(8, "little")]
        blocks = self.build(num_blocks=8, block_size=2)
        for identity in identities:
            assert blocks.match(sequence_of([1, 2, 3, 4, 5], identity)) == 0
            run(blocks, sequence_of([1, 2, 3, 4], identity))
        assert blocks.num_free_blocks == 0
        for identity in identities:
            found = blocks.match(sequence_of([1, 2, 3, 4, 5], identity))
            assert found == (4 if self.shares_prefixes else 0)
        assert blocks.match(sequence_of([1, 2, 3, 4, 5], b"c")) == 0

    def test_a_waiting_sequence_is_not_looked_up_again(self) -> None:
        """Asking about a long prompt in every step costs as much as about a short one, though blocks come and go."""
        calls = []
        for num_blocks in (40, 1280):
            blocks = self.build(num_blocks=num_blocks + 2, block_size=2)
            first, waiting = sequence_of(range(2 * num_blocks)), sequence_of(range(4 * num_blocks))
            run(blocks, first)
            refused = [count_calls(lambda: blocks.match(waiting))]  # noqa: B023 (called at once)
            for token in range(-20, 0):
                refused.append(count_calls(lambda: (blocks.match(waiting), blocks.allocate(waiting, 6))))  # noqa: B023
                assert not waiting.block_table
                other = sequence_of([token] * 2)
                run(blocks, other)
                blocks.free(other)
            calls.append(max(refused[2:]))
        assert calls[1] <= calls[0] + 8, f"{calls[0]} calls with 40 blocks and {calls[1]} with 1280"

    def test_every_eviction_is_told_once(self) -> None:
        """`on_evict` is called for the blocks that could be found and can't any more, and for no others."""
        rng = random.Random(0)
        blocks = self.build(num_blocks=7, block_size=2)
        told: list[int] = []
        blocks.on_evict = told.append
        holders: dict[tuple[int, ...], int] = {}  # a prefix -> the block that held its end when it was last computed
        held: list[Sequence] = []

        def findable() -> set[int]:
            return {
                block for prefix, block in holders.items() if blocks.match(sequence_of([*prefix, 9])) == len(prefix)
            }

        for _ in range(300):
            before = findable()
            sequence = sequence_of([rng.randrange(2) for _ in range(rng.choice([3, 5, 7]))])  # no block is filled twice
            if blocks.allocate(sequence, sequence.num_tokens - blocks.match(sequence)):
                assert sorted(told) == sorted(before - findable()), "after allocate"
                told.clear()
                before = findable()
                sequence.num_computed_tokens = sequence.num_tokens
                blocks.commit(sequence)
                held.append(sequence)
                for index, block in enumerate(sequence.block_table[:-1]):
                    holders[tuple(sequence.token_ids[: 2 * index + 2])] = block
            if held and rng.random() < 0.7:
                blocks.free(held.pop(rng.randrange(len(held))))
            assert sorted(told) == sorted(before - findable()), "after commit and free"
            told.clear()

    def test_match_is_what_allocate_takes(self) -> None:
        """And what it takes holds the sequence's tokens, after any history of what was computed and freed."""

        @settings(KIT, max_examples=60)
        @given(
            prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=10), min_size=1, max_size=14),
            frees=st.lists(st.integers(0, 14), min_size=14, max_size=14), block_size=st.integers(1, 3),
            num_blocks=st.integers(10, 24),
        )  # fmt: skip
        def compare(prompts: list[list[int]], frees: list[int], block_size: int, num_blocks: int) -> None:
            blocks = self.build(num_blocks, block_size)
            holds: dict[int, tuple[int, ...]] = {}  # block -> the tokens up to its end
            held: list[Sequence] = []
            for prompt, leaves in zip(prompts, frees, strict=False):
                sequence = sequence_of(prompt)
                free, hits, queried = blocks.num_free_blocks, blocks.num_hit_tokens, blocks.num_queried_tokens
                found = blocks.match(sequence)
                assert (blocks.match(sequence), blocks.num_free_blocks) == (found, free), "match changes nothing"
                assert found % block_size == 0
                assert found <= sequence.num_skippable_tokens
                if not blocks.allocate(sequence, len(prompt) - found):
                    assert -(-len(prompt) // block_size) > free, f"{free} free blocks are enough for {prompt}"
                else:
                    assert sequence.num_computed_tokens == found
                    assert blocks.num_hit_tokens - hits == found
                    assert blocks.num_queried_tokens - queried == (len(prompt) if self.shares_prefixes else 0)
                    for index, block in enumerate(sequence.block_table):
                        tokens = tuple(prompt[: (index + 1) * block_size])
                        assert index * block_size >= found or holds[block] == tokens, f"block {block} is not {tokens}"
                        holds[block] = tokens
                    sequence.num_computed_tokens = len(prompt)
                    blocks.commit(sequence)
                    held.append(sequence)
                if leaves < len(held):
                    blocks.free(held.pop(leaves))
            for sequence in held:
                blocks.free(sequence)
            assert blocks.num_free_blocks == num_blocks

        compare()


def sequence_of(token_ids: list[int] | range, identity: bytes = b"") -> Sequence:
    """A new sequence with this prompt."""
    return Sequence("r", list(token_ids), SamplingParams(), max_tokens=100, cache_identity=identity)


def count_calls(function: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called by this one."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def run(blocks: BlockManager, sequence: Sequence) -> None:
    """Compute all of the sequence's tokens."""
    assert blocks.allocate(sequence, sequence.num_tokens - blocks.match(sequence))
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)
