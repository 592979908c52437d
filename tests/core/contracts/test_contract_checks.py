"""The debug mode's checks: silent for what is right, and a sentence for each way to break a contract."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from nanoflow.core.api.llm import LLM
from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.config.errors import PluginError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManagerContext
from nanoflow.core.contracts.contract_checks import CheckedBlockManager, CheckedScheduler
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.component import NoOptions
from nanoflow.plugins.block_managers.plain import PlainBlockManager
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler
from nanoflow.testing.loads import drive
from nanoflow.testing.world import Limits, World
from tests.core.sentences import raises_sentence


def checked(
    limits: Limits, scheduler: type[FCFSScheduler] = FCFSScheduler, blocks: type[Any] = PlainBlockManager
) -> CheckedScheduler:
    manager = CheckedBlockManager(
        blocks(NoOptions(), BlockManagerContext(limits.num_blocks, limits.block_size)), "block_manager=b"
    )
    config = SchedulerConfig(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.budget)
    built = scheduler(config, SchedulerContext(manager, limits.max_tokens + 1))
    return CheckedScheduler(built, "scheduler=s", config, manager)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("blocks", [PlainBlockManager, PrefixBlockManager])
def test_silent_for_what_is_right(blocks: type[Any], depth: int) -> None:
    """Random loads with preemptions, aborts and hits."""

    def make(limits: Limits) -> World:
        scheduler = checked(limits, blocks=blocks)
        return World(scheduler, scheduler.blocks, limits)

    counts = drive(make, random.Random(depth), depth, 1500)
    assert counts["preemptions"] > 0
    assert counts["aborts"] > 0
    assert (counts["hits"] > 0) == (blocks is PrefixBlockManager)


def run(scheduler: CheckedScheduler, num_requests: int = 3, prompt_len: int = 6) -> None:
    """Three requests to their end, a step at a time; the second one is aborted on the way."""
    for index in range(num_requests):
        scheduler.add(Sequence(f"r{index}", [1] * prompt_len, SamplingParams(), max_tokens=6))
    for step in range(200):
        batch = scheduler.schedule()
        if batch is None:
            assert not scheduler.unfinished
            return
        for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
            if samples:
                sequence.append_token(1)
        scheduler.update(batch)
        if step == 4 and (sequence := scheduler.abort("r1")):
            sequence.finish("abort")


ROOMY = Limits(num_blocks=16, block_size=4, max_num_seqs=2, budget=8, depth=0)
TIGHT = Limits(num_blocks=4, block_size=4, max_num_seqs=2, budget=8, depth=0)


def test_the_load_of_these_tests_is_fine() -> None:
    for limits in (ROOMY, TIGHT):
        run(checked(limits))


class Greedy(FCFSScheduler):
    """Spends more than the budget."""

    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.max_num_batched_tokens += 4


class Crowded(FCFSScheduler):
    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        super().__init__(config, context)
        self.max_num_seqs += 1


class Homeless(FCFSScheduler):
    """Runs a sequence beyond its blocks."""

    def _enter(self, batch: Batch, sequence: Sequence, num_tokens: int) -> None:
        if num_tokens == 1 and len(sequence.block_table) == 2:
            sequence.block_table.pop()
        super()._enter(batch, sequence, num_tokens)


class Lazy(FCFSScheduler):
    def schedule(self) -> Batch | None:
        return None


class Empty(FCFSScheduler):
    def schedule(self) -> Batch | None:
        return super().schedule() or Batch() if self.unfinished else Batch()


class Twice(FCFSScheduler):
    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None and len(batch.sequences) == 2:
            batch.sequences[0] = batch.sequences[1]
        return batch


class Backwards(FCFSScheduler):
    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None:
            for part in (batch.sequences, batch.starts, batch.num_tokens, batch.samples):
                part.reverse()
        return batch


class Skipping(FCFSScheduler):
    def _enter(self, batch: Batch, sequence: Sequence, num_tokens: int) -> None:
        super()._enter(batch, sequence, num_tokens)
        batch.starts[-1] += sequence.num_computed_tokens > 6


class Undead(FCFSScheduler):
    """Goes on with what has ended."""

    def update(self, batch: Batch) -> list[Sequence]:
        for sequence in batch.sequences:
            self.blocks.commit(sequence)
        return []


class Keeper(FCFSScheduler):
    """Doesn't free the blocks of an aborted request."""

    def abort(self, request_id: str) -> Sequence | None:
        place = self.unfinished.pop(request_id, None)
        if place is None:
            return None
        (self.running if place in self.running else self.waiting).remove(place)
        return place.sequence


class Silent(FCFSScheduler):
    """Doesn't say who was preempted."""

    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None:
            batch.preempted = []
        return batch


class Blind(FCFSScheduler):
    num_running = 0


class Forgetful(FCFSScheduler):
    def abort(self, request_id: str) -> Sequence | None:
        return None


class Excuses(FCFSScheduler):
    def wait_reason(self) -> WaitReason | None:
        reason = super().wait_reason()
        return reason and replace(reason, cause=WaitCause.GAVE_WAY)


class Framing(FCFSScheduler):
    """Says that others needed more blocks than they did."""

    def schedule(self) -> Batch | None:
        batch = super().schedule()
        if batch is not None:
            batch.preempt_reasons = [replace(r, needed=r.needed + 1) for r in batch.preempt_reasons]
        return batch


SCHEDULERS = {
    Greedy: "with sequence 'r1': with it the batch has 12 tokens, more than max_num_batched_tokens=8",
    Crowded: "more than max_num_seqs=2",
    Homeless: "with sequence 'r0': it has 1 blocks of 4 tokens, and its chunk ends at 7; call ",
    Lazy: "in step 1 with sequence 'r0': nothing runs, though 3 sequences are unfinished",
    Empty: "the batch is empty; return None where nothing can run",
    Twice: "it is in the batch 2 times",
    Backwards: "it decodes and comes after longer chunks in the batch",
    Skipping: "its chunk starts at 7, though 6 tokens are computed",
    Undead: "with sequence 'r0': update does not return, once each, those of the batch that ended with it",
    Keeper: "with sequence 'r1': it was aborted and keeps blocks",
    Silent: "Batch.preempted is not who lost its blocks since the last batch",
    Blind: "in step 1: (num_running, num_waiting) is (0, 1), and (with, without blocks) (2, 1)",
    Excuses: "in step 1: wait_reason says WaitReason(cause=<WaitCause.GAVE_WAY",
    Framing: "is not true: there was no such refusal of blocks",
    Forgetful: "with sequence 'r1': abort returned None",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
def test_a_scheduler_that_breaks_its_contract(scheduler: type[FCFSScheduler]) -> None:
    with raises_sentence(PluginError, "scheduler=s broke its contract in step", SCHEDULERS[scheduler]):
        for limits in (ROOMY, TIGHT):
            run(checked(limits, scheduler))


class Leaky(PlainBlockManager):
    def free(self, sequence: Sequence) -> None:
        del sequence.block_table[-1:]
        super().free(sequence)


class Shared(PlainBlockManager):
    """Hands out a block and leaves it among the free ones."""

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        before = len(sequence.block_table)
        given = super().allocate(sequence, num_tokens)
        self.free_blocks += sequence.block_table[before:]
        return given


class Stingy(PlainBlockManager):
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        return super().allocate(sequence, num_tokens - 1)


class Halfway(PlainBlockManager):
    """Takes what there is before it says no."""

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        given = super().allocate(sequence, num_tokens)
        if not given and self.free_blocks:
            sequence.block_table.append(self.free_blocks.pop())
        return given


class Dreamer(PlainBlockManager):
    def match(self, sequence: Sequence) -> int:
        return 3


class Clinging(PlainBlockManager):
    def free(self, sequence: Sequence) -> None:
        computed = sequence.num_computed_tokens
        super().free(sequence)
        sequence.num_computed_tokens = computed


class Moving(PlainBlockManager):
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        given = super().allocate(sequence, num_tokens)
        sequence.block_table.reverse()
        return given


class Chatty(PlainBlockManager):
    def free(self, sequence: Sequence) -> None:
        block = sequence.block_table[-1]
        super().free(sequence)
        self.on_evict(block)  # type: ignore[misc]


class Repeating(PrefixBlockManager):
    def _forget(self, block_id: int) -> None:
        super()._forget(block_id)
        self.on_evict(block_id)  # type: ignore[misc]


class Secretive(PrefixBlockManager):
    def _evict(self) -> int:
        told, self.on_evict = self.on_evict, None
        block_id = super()._evict()
        self.on_evict = told
        return block_id


MANAGERS = {
    Leaky: "with sequence 'r1': 12 blocks are free and 3 held, which is not 16",
    Shared: "which is not 16",
    Stingy: "gave 2 blocks of 4 tokens for 9 tokens",
    Halfway: "allocate returned False and changed its block table",
    Dreamer: "in step 1 with sequence 'r0': match found 3 tokens",
    Clinging: "free left Sequence('r1'",
    Chatty: "on_evict was called for block",
    Repeating: "or for which it was called before",
    Moving: "allocate changed the blocks that it had",
}


@pytest.mark.parametrize("blocks", MANAGERS, ids=lambda b: b.__name__)
def test_a_block_manager_that_breaks_its_contract(blocks: type[Any]) -> None:
    with raises_sentence(PluginError, "block_manager=b broke its contract in step", MANAGERS[blocks]):
        for limits in (ROOMY, TIGHT, Limits(3, block_size=4, max_num_seqs=2, budget=16, depth=0)):
            run(checked(limits, blocks=blocks))


def test_an_eviction_that_is_not_told() -> None:
    scheduler = checked(TIGHT, blocks=Secretive)
    run(scheduler)  # with prompts that share a block
    scheduler.add(Sequence("all", [2] * 15, SamplingParams(), max_tokens=1))
    with raises_sentence(PluginError, "with sequence 'all': it gave away blocks", "and did not call on_evict"):
        run(scheduler, num_requests=0)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_is_the_same_with_the_checks(overlap: bool) -> None:
    """Its tokens and its counts, in chunks, with prefixes from the cache and preemptions."""
    outcomes = []
    for debug in (False, True):
        options = {
            "device": "cpu",
            "block_size": 4,
            "num_kv_blocks": 20,
            "max_num_batched_tokens": 8,
            "max_num_seqs": 4,
        }
        with LLM(debug=debug, overlap=overlap, **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=24, n=2)
            prompts = ["HAMLET:\nTo be, or not to be", "HAMLET:\nTo be, or not", "JULIET:\nO Romeo, Romeo"]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            outcomes.append(([c.token_ids for output in outputs for c in output.outputs], llm.stats))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1].num_preemptions > 0
    assert outcomes[0][1].num_hit_tokens > 0
