"""A scheduler and a block manager at work without a model, and everything that must hold while they are.

The "device" is a record of which tokens lie in each slot of the KV cache. Its "model" samples a token that follows from
the tokens before it, so that equal prompts have equal outputs and the prefix cache has something to find.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.reason_checks import RefusedBlocks, untrue_preemptions, untrue_wait
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.reasons import WaitReason
from nanoflow.core.data.sequence import Sequence

ALPHABET = 3
STOP_TOKEN = 0
EMPTY = -1
START = 7
PATIENCE = 10  # steps for each token that is left; recomputation may take several


def chain(digest: int, token: int) -> int:
    """A number that stands for `token` after the tokens that `digest` stands for."""
    return hash((digest, token))


def beginning(identity: bytes) -> int:
    """A number that stands for no tokens yet; under another `Sequence.cache_identity` another one."""
    return START + zlib.crc32(identity)


@dataclass
class Request:
    """One request, as the device sees it.

    Attributes:
        sequence: the engine's view of it.
        arrival: its place in the order of arrival.
        salt: what makes the model another one.
        tokens: all its tokens, those in flight included.
        digests: for each token, a number that stands for it and all before it.
        end: how it ended; None while it goes on.
    """

    sequence: Sequence
    arrival: int
    salt: int
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    end: str | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        last = self.digests[-1] if self.digests else beginning(self.sequence.cache_identity)
        self.digests.append(chain(last, token))

    @property
    def holds_blocks(self) -> bool:
        return bool(self.sequence.block_table)

    def next_token(self) -> int:
        """What the model samples after these tokens."""
        return (chain(self.digests[-1], self.salt) >> 7) % ALPHABET


@dataclass(frozen=True)
class Plan:
    """Live requests before a step is planned, by id.

    Attributes:
        computed: computed tokens of those that hold blocks.
        due: tokens to compute.
        started: those with output.
    """

    computed: dict[str, int]
    due: dict[str, int]
    started: set[str]

    @property
    def decoding(self) -> list[str]:
        """Those that hold blocks and compute their last output token next."""
        return [name for name in self.computed if self.due[name] == 1 and name in self.started]


class Fancy:
    """A grammar that takes any token, and after some of them leaves no choice about those that follow."""

    is_complete = False

    def __init__(self, request: Request) -> None:
        self.request = request

    def accept(self, token_id: int) -> bool:
        return True

    def forced(self) -> list[int]:
        num_tokens = max(0, (self.request.digests[-1] >> 11) % 8 - 3)
        for _ in range(num_tokens):
            self.request.append(self.request.next_token())
        return self.request.tokens[len(self.request.tokens) - num_tokens :]

    @property
    def error(self) -> str:
        return ""


@dataclass(frozen=True)
class Limits:
    """The size of a world.

    Attributes:
        num_blocks: of the cache.
        block_size: P.
        max_num_seqs: the scheduler's.
        budget: its `max_num_batched_tokens`.
        depth: steps in flight while the next is scheduled.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    depth: int

    @property
    def max_tokens(self) -> int:
        """That a request may keep in the cache."""
        return self.num_blocks * self.block_size


class World:
    """Drives a scheduler and a block manager as the engine does, and checks each step.

    A subclass may add what a plugin promises beyond its interface: `check_batch` after each step is planned, `check`
    between any two calls.

    Args:
        scheduler, blocks: freshly made; the scheduler with these blocks.
        limits: what they were made with.
        salt: other outputs for the same prompts.

    Attributes:
        cache: for each block and place the number that stands for the token that lies there and those before it.
        requests: by id.
        live: unfinished requests in order of arrival.
        counts: how often what happened.
        refused: calls of `BlockManager.allocate` that returned False since the last batch.
    """

    def __init__(self, scheduler: Scheduler, blocks: BlockManager, limits: Limits, salt: int = 0) -> None:
        self.scheduler = scheduler
        self.blocks = blocks
        self.limits = limits
        self.salt = salt
        self.cache = [[EMPTY] * limits.block_size for _ in range(limits.num_blocks)]
        self.requests: dict[str, Request] = {}
        self.live: list[Request] = []
        self.in_flight: deque[Batch] = deque()
        self.unreported: set[str] = set()  # preempted since the last batch
        self.counts: Counter[str] = Counter()
        self.refused: list[RefusedBlocks] = []
        self._watch_refusals()

    def _watch_refusals(self) -> None:
        allocate = self.blocks.allocate

        def watched(sequence: Sequence, num_tokens: int) -> bool:
            given = allocate(sequence, num_tokens)
            if not given:
                self.refused.append(RefusedBlocks.of(self.blocks, sequence, num_tokens))
            return given

        self.blocks.allocate = watched  # type: ignore[method-assign]

    def add(
        self, prompt: list[int], max_tokens: int, *, stops: bool = False, has_grammar: bool = False,
        params: SamplingParams | None = None, identity: bytes = b"",
    ) -> Request:  # fmt: skip
        """Queue a request, cut to what fits into the cache. Its prefix is shared under this identity alone."""
        prompt = prompt[: self.limits.max_tokens]
        max_tokens = min(max_tokens, self.limits.max_tokens + 1 - len(prompt))
        name = f"r{len(self.requests)}"
        sequence = Sequence(
            name, prompt, params or SamplingParams(), max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP_TOKEN} if stops else ()), cache_identity=identity,
        )  # fmt: skip
        request = Request(sequence, len(self.requests), self.salt)
        for token in prompt:
            request.append(token)
        if has_grammar:
            sequence.constraint, sequence.needs_values = Fancy(request), True
        self.requests[name] = request
        self.live.append(request)
        self.scheduler.add(sequence)
        self.check()
        return request

    def abort(self, index: int) -> None:
        """Abort one of the unfinished requests."""
        request = self.live[index % len(self.live)]
        known = self.scheduler.abort(request.sequence.request_id)
        assert known is request.sequence, f"abort returned {known}, not the sequence of that id"
        request.sequence.finish("abort")
        self._end(request)
        assert not request.sequence.block_table, f"{request.sequence} was aborted and keeps blocks"
        assert self.scheduler.abort(request.sequence.request_id) is None, "a request can be aborted once"
        self.counts["aborts"] += 1
        self.check()

    def step(self, finish: int | None = None) -> None:
        """One step of the engine.

        Args:
            finish: end that one of the sequences whose tokens arrive in this step, as a stop string would.
        """
        batch = self._schedule()
        if batch is not None:
            self._run(batch)
            self.in_flight.append(batch)
        if self.in_flight and (batch is None or len(self.in_flight) > self.limits.depth):
            self._take(self.in_flight.popleft(), finish)
        self.counts["steps"] += 1
        self.check()

    def drain(self) -> None:
        """Run until all requests have ended, and see that all blocks are free."""
        left = sum(len(r.tokens) + r.sequence.max_tokens + 1 for r in self.live)
        bound = PATIENCE * (left + self.limits.depth)
        while self.live:
            assert bound > 0, f"these get nowhere: {[request.sequence for request in self.live]}"
            bound -= 1
            self.step()
        while self.in_flight:
            self.step()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "blocks were lost"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(request.end is not None for request in self.requests.values())

    def _schedule(self) -> Batch | None:
        before = Plan(
            computed={r.sequence.request_id: r.sequence.num_computed_tokens for r in self.live if r.holds_blocks},
            due={r.sequence.request_id: r.sequence.num_uncomputed_tokens for r in self.live},
            started={r.sequence.request_id for r in self.live if r.sequence.num_output_tokens > 0},
        )
        batch = self.scheduler.schedule()
        reason = self.scheduler.wait_reason()
        lost = {name for name in before.computed if not self.requests[name].holds_blocks}
        self.unreported |= lost
        self.counts["preemptions"] += len(lost)
        self.check_batch(batch, before, lost)
        if batch is None:
            assert self.in_flight or not self.live, f"nothing runs, though {len(self.live)} requests are unfinished"
            self._check_reasons(Batch(), reason, gave_way=bool(lost))
            return None
        preempted = [sequence.request_id for sequence in batch.preempted]
        assert sorted(preempted) == sorted(self.unreported), "Batch.preempted is not who lost blocks since the last one"
        self.unreported = set()
        self._check_limits(batch)
        for index, sequence in enumerate(batch.sequences):
            self._check_entry(batch, index, sequence, before)
        names = [sequence.request_id for sequence in batch.sequences]
        places = [names.index(name) for name in before.decoding if name in names]
        assert sorted(places) == list(range(len(places))), "decoding sequences must come before the others in a batch"
        self.counts["mixed"] += 0 < len(places) < len(names)
        self._check_reasons(batch, reason, gave_way=bool(lost))
        self.refused.clear()
        return batch

    def _check_reasons(self, batch: Batch, reason: WaitReason | None, *, gave_way: bool) -> None:
        waiting = [r.sequence.request_id for r in self.live if not r.holds_blocks]
        untrue = untrue_wait(
            reason, waiting, self.refused, gave_way=gave_way,
            places_left=self.limits.max_num_seqs - len(self.live) + len(waiting),
            budget_left=self.limits.budget - batch.total_tokens,
        )  # fmt: skip
        untrue = untrue or untrue_preemptions(batch, self.refused)
        assert not untrue, untrue
        if reason is not None:
            self.counts[f"wait: {reason.cause}"] += 1

    def check_batch(self, batch: Batch | None, before: Plan, lost: set[str]) -> None:
        """What else must hold of a new batch.

        Args:
            batch: what `schedule` returned.
            before: how things were before it.
            lost: ids of those whose blocks it freed.
        """

    def _check_limits(self, batch: Batch) -> None:
        count, total = len(batch.sequences), sum(batch.num_tokens)
        assert count > 0, "an empty batch; return None where nothing can run"
        assert len(set(batch.sequences)) == count, "a sequence is in the batch twice"
        assert count <= self.limits.max_num_seqs, f"{count} sequences are more than {self.limits.max_num_seqs}"
        assert total <= self.limits.budget, f"{total} tokens are more than the budget of {self.limits.budget}"
        assert count == len(batch.starts) == len(batch.num_tokens) == len(batch.samples)

    def _check_entry(self, batch: Batch, index: int, sequence: Sequence, before: Plan) -> None:
        name, request = sequence.request_id, self.requests[sequence.request_id]
        start, num_tokens = batch.starts[index], batch.num_tokens[index]
        assert request.end is None, f"{sequence} runs after its end"
        assert before.due[name] > 0, f"{sequence} has nothing to compute until its token in flight is there"
        if name in before.computed:
            assert start == before.computed[name], f"{sequence} goes on at {start}, not at {before.computed[name]}"
            assert num_tokens <= before.due[name]
        else:
            assert start % self.limits.block_size == 0, f"{sequence} starts at {start}; only whole blocks are shared"
            assert sequence.num_in_flight == batch.samples[index], f"{sequence} was admitted with a token in flight"
            self.counts["hits"] += start > 0
        assert num_tokens >= 1
        assert start + num_tokens <= len(request.tokens), f"{sequence} runs beyond its {len(request.tokens)} tokens"
        assert batch.samples[index] == (start + num_tokens == len(request.tokens))
        room = len(sequence.block_table) * self.limits.block_size
        assert room >= start + num_tokens, f"{sequence} has blocks for {room} of {start + num_tokens} tokens"
        self.counts["chunks"] += not batch.samples[index]

    def _run(self, batch: Batch) -> None:
        """What the device does: store the whole batch first, then read each context, then sample."""
        size = self.limits.block_size
        for sequence, start, num_tokens in zip(batch.sequences, batch.starts, batch.num_tokens, strict=True):
            digests = self.requests[sequence.request_id].digests
            for position in range(start, start + num_tokens):
                self.cache[sequence.block_table[position // size]][position % size] = digests[position]
        for request in self.live:
            sequence = request.sequence
            for index in range(-(-sequence.num_computed_tokens // size)):
                expected = request.digests[index * size : min((index + 1) * size, sequence.num_computed_tokens)]
                stored = self.cache[sequence.block_table[index]][: len(expected)]
                assert stored == expected, f"{sequence} reads what is not its own in block {index} of its table"
        for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
            request = self.requests[sequence.request_id]
            if samples:
                request.append(request.next_token())

    def _take(self, batch: Batch, finish: int | None) -> None:
        arrived = []
        for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
            if samples and not sequence.is_finished:
                tokens = self.requests[sequence.request_id].tokens
                sequence.append_token(tokens[len(sequence.token_ids)])
                assert sequence.token_ids == tokens[: len(sequence.token_ids)]
                arrived.append(sequence)
        if finish is not None and arrived:
            arrived[finish % len(arrived)].finish("stop", "text")
        ended = self.scheduler.update(batch)
        assert len(ended) == len(set(ended)), "update returned a sequence twice"
        expected = {s for s in batch.sequences if s.is_finished and self.requests[s.request_id].end is None}
        assert set(ended) == expected, "update returns those of the batch that ended with it"
        for sequence in ended:
            self._end(self.requests[sequence.request_id])
            assert not sequence.block_table, f"{sequence} ended and keeps blocks"
            assert sequence.num_output_tokens - sequence.num_in_flight <= sequence.max_tokens
            self.counts["ends"] += 1

    def _end(self, request: Request) -> None:
        assert request.end is None, "a request ended twice"
        request.end = request.sequence.finish_reason
        assert request.end in ("stop", "length", "abort")
        self.live.remove(request)

    def check(self) -> None:
        """What must hold between any two calls."""
        holding = [r for r in self.live if r.holds_blocks]
        counts = self.scheduler.num_running, self.scheduler.num_waiting
        expected = len(holding), len(self.live) - len(holding)
        assert counts == expected, f"(num_running, num_waiting) is {counts}, and (with, without blocks) {expected}"
        assert len(holding) <= self.limits.max_num_seqs, "more than max_num_seqs sequences hold blocks"
        for request in holding:
            table = request.sequence.block_table
            assert len(set(table)) == len(table), f"{request.sequence} has a block twice: {table}"
        self.check_blocks(Counter(block for r in holding for block in r.sequence.block_table))

    def check_blocks(self, owners: Counter[int]) -> None:
        """What must hold of the blocks, given how many sequences hold each."""
        assert set(owners) <= set(range(self.limits.num_blocks)), f"there are no such blocks among {sorted(owners)}"
        free, held = self.blocks.num_free_blocks, len(owners)
        assert free + held == self.limits.num_blocks, f"{free} free and {held} held of {self.limits.num_blocks} blocks"
