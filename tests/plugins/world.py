"""A scheduler and a block manager at work without a model, and everything that must hold while they are.

The "device" is a record of which tokens lie in each slot of the KV cache. Its "model" samples a token that follows from
the tokens before it, so that equal prompts have equal outputs and the prefix cache has something to find.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from nanoflow.core.config import SamplingParams, SchedulerConfig
from nanoflow.core.interfaces import BlockManager, BlockManagerContext, NoOptions, SchedulerContext
from nanoflow.core.types import Batch, Sequence
from nanoflow.plugins.block_managers.plain import PlainBlockManager
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager
from nanoflow.plugins.schedulers.fcfs import FCFSScheduler

MANAGERS: dict[str, type[BlockManager]] = {"plain": PlainBlockManager, "prefix": PrefixBlockManager}
ALPHABET = 3
STOP_TOKEN = 0
EMPTY = -1
START = 7


def chain(digest: int, token: int) -> int:
    """A number that stands for `token` after the tokens that `digest` stands for."""
    return hash((digest, token))


@dataclass
class Request:
    """One request, as the device sees it.

    Attributes:
        sequence: the engine's view of it.
        arrival: its place in the order of arrival.
        tokens: all its tokens, those in flight included.
        digests: for each token, a number that stands for it and all before it.
        end: how it ended; None while it goes on.
    """

    sequence: Sequence
    arrival: int
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    end: str | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(chain(self.digests[-1] if self.digests else START, token))

    def next_token(self) -> int:
        """What the model samples after these tokens."""
        return (self.digests[-1] >> 7) % ALPHABET


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


class World:
    """Drives scheduler and block manager as the engine does, and checks each step.

    Args:
        manager: a name in `MANAGERS`.
        num_blocks: size of the cache.
        block_size: P.
        max_num_seqs: the scheduler's.
        budget: its max_num_batched_tokens.
        depth: steps in flight while the next is scheduled.
    """

    def __init__(
        self, *, manager: str, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, depth: int
    ) -> None:
        self.block_size = block_size
        self.depth = depth
        self.blocks: Any = MANAGERS[manager](NoOptions(), BlockManagerContext(num_blocks, block_size))
        self.max_tokens = num_blocks * block_size  # that a request may keep in the cache
        self.scheduler = FCFSScheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
            SchedulerContext(self.blocks, self.max_tokens + 1),
        )
        self.cache = [[EMPTY] * block_size for _ in range(num_blocks)]  # digests of the tokens in each slot
        self.requests: dict[str, Request] = {}
        self.live: list[Request] = []  # unfinished, in order of arrival
        self.in_flight: deque[Batch] = deque()
        self.unreported: set[str] = set()  # preempted since the last batch
        self.counts: Counter[str] = Counter()

    def add(self, prompt: list[int], max_tokens: int, stops: bool = False, has_grammar: bool = False) -> None:
        """Queue a request, cut to what fits into the cache."""
        prompt = prompt[: self.max_tokens]
        max_tokens = min(max_tokens, self.max_tokens + 1 - len(prompt))
        name = f"r{len(self.requests)}"
        sequence = Sequence(
            name, prompt, SamplingParams(), max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP_TOKEN} if stops else ()),
        )  # fmt: skip
        request = Request(sequence, len(self.requests))
        for token in prompt:
            request.append(token)
        if has_grammar:
            sequence.grammar = Fancy(request)  # type: ignore[assignment]
        self.requests[name] = request
        self.live.append(request)
        self.scheduler.add(sequence)
        self.check()

    def abort(self, index: int) -> None:
        """Abort one of the unfinished requests."""
        request = self.live[index % len(self.live)]
        assert self.scheduler.abort(request.sequence.request_id) is request.sequence
        request.sequence.finish("abort")
        self._end(request)
        assert not request.sequence.block_table
        assert self.scheduler.abort(request.sequence.request_id) is None
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
        if self.in_flight and (batch is None or len(self.in_flight) > self.depth):
            self._take(self.in_flight.popleft(), finish)
        self.counts["steps"] += 1
        self.check()

    def drain(self) -> None:
        """Run until all requests have ended; that takes no more steps than there are tokens, or two for each."""
        bound = sum(len(r.tokens) + r.sequence.max_tokens + 1 for r in self.live) + self.depth
        if self.depth and any(r.sequence.grammar is not None for r in self.live):
            bound *= 2  # each token is waited for before the next is planned
        while self.live:
            assert bound > 0, f"still unfinished: {self.live}"
            bound -= 1
            self.step()
        while self.in_flight:
            self.step()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(request.end is not None for request in self.requests.values())

    def _schedule(self) -> Batch | None:
        before = {r.sequence.request_id: r.sequence.num_computed_tokens for r in self.live if r.sequence.block_table}
        due = {r.sequence.request_id: r.sequence.num_uncomputed_tokens for r in self.live}
        started = {r.sequence.request_id for r in self.live if r.sequence.num_output_tokens > 0}
        waiting = {r.sequence.request_id for r in self.live if r.sequence.grammar and r.sequence.num_in_flight}
        batch = self.scheduler.schedule()
        lost = {name for name in before if not self.requests[name].sequence.block_table}
        self.unreported |= lost
        self.counts["preemptions"] += len(lost)
        names = [sequence.request_id for sequence in batch.sequences] if batch else []
        decoding = [name for name in before if due[name] == 1 and name in started]
        assert all(name in names or name in lost for name in decoding), "a decode was left out"
        first = self.live[0].sequence.request_id if self.live else None
        assert first not in lost, "the oldest request lost its blocks"
        assert first is None or not due[first] or first in names, "the oldest request was left out"
        if batch is None:
            return None

        assert sorted(s.request_id for s in batch.preempted) == sorted(self.unreported)
        self.unreported = set()
        assert 0 < len(names) == len(set(names)) <= self.scheduler.max_num_seqs
        assert len(names) == len(batch.starts) == len(batch.num_tokens) == len(batch.samples)
        assert batch.total_tokens == sum(batch.num_tokens) <= self.scheduler.max_num_batched_tokens
        assert all(name in before or name not in lost for name in names)
        for index, sequence in enumerate(batch.sequences):
            request = self.requests[sequence.request_id]
            start, num_tokens = batch.starts[index], batch.num_tokens[index]
            assert request.end is None
            assert sequence.request_id not in waiting, "the grammar does not know the last token yet"
            if sequence.request_id in before:
                assert start == before[sequence.request_id]
                assert num_tokens <= due[sequence.request_id]
            else:
                assert start % self.block_size == 0, "only whole blocks are shared"
                assert sequence.num_in_flight == batch.samples[index], "admitted before its last token was known"
                self.counts["hits"] += start > 0
            assert num_tokens >= 1
            assert start + num_tokens <= len(request.tokens)
            assert batch.samples[index] == (start + num_tokens == len(request.tokens))
            assert len(sequence.block_table) * self.block_size >= start + num_tokens
            self.counts["chunks"] += not batch.samples[index]
        places = [names.index(name) for name in decoding if name in names]
        assert sorted(places) == list(range(len(places))), "decodes come first"
        self.counts["mixed"] += 0 < len(places) < len(names)
        return batch

    def _run(self, batch: Batch) -> None:
        """What the device does: store the whole batch first, then read each context, then sample."""
        size = self.block_size
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
        assert len(ended) == len(set(ended))
        assert set(ended) == {
            s for s in batch.sequences if s.is_finished and self.requests[s.request_id].end is None
        }  # fmt: skip
        for sequence in ended:
            self._end(self.requests[sequence.request_id])
            assert not sequence.block_table
            assert sequence.num_output_tokens - sequence.num_in_flight <= sequence.max_tokens
            self.counts["ends"] += 1

    def _end(self, request: Request) -> None:
        assert request.end is None, "a request ended twice"
        request.end = request.sequence.finish_reason
        assert request.end in ("stop", "length", "abort")
        self.live.remove(request)

    def check(self) -> None:
        """What must hold between any two calls."""
        holding = [r for r in self.live if r.sequence.block_table]
        waiting = [r for r in self.live if not r.sequence.block_table]
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(holding), len(waiting))
        assert len(holding) <= self.scheduler.max_num_seqs
        if holding and waiting:
            assert holding[-1].arrival < waiting[0].arrival, "a later request holds blocks while an earlier one waits"
        owners = Counter(block for r in holding for block in r.sequence.block_table)
        assert all(len(set(r.sequence.block_table)) == len(r.sequence.block_table) for r in holding)
        assert set(owners) <= set(range(self.blocks.num_blocks))
        assert self.blocks.num_free_blocks + len(owners) == self.blocks.num_blocks
        if isinstance(self.blocks, PlainBlockManager):
            assert max(owners.values(), default=1) == 1
            assert sorted([*self.blocks.free_blocks, *owners]) == list(range(self.blocks.num_blocks))
        else:
            self._check_prefix(owners)

    def _check_prefix(self, owners: Counter[int]) -> None:
        manager: PrefixBlockManager = self.blocks
        assert [block.ref_count for block in manager.blocks] == [owners[i] for i in range(manager.num_blocks)]
        assert sorted([*manager.blank, *manager.idle, *owners]) == list(range(manager.num_blocks))
        findable = {i for i, block in enumerate(manager.blocks) if block.key is not None}
        assert set(manager.cached.values()) == findable
        assert set(manager.idle) == findable - set(owners)
        for digest, block_id in manager.cached.items():
            key = manager.blocks[block_id].key
            assert key is not None
            assert key.digest == digest
        self._check_content()

    def _check_content(self) -> None:
        """Walk the tree of cached prefixes: each block that can be found holds the tokens that it is found by."""
        children: dict[int, list[int]] = {}
        for block_id in self.blocks.cached.values():
            children.setdefault(self.blocks.blocks[block_id].parent_id, []).append(block_id)
        reached = [(0, START)]
        while reached:
            parent_id, digest = reached.pop()
            for block_id in children.get(parent_id, ()):
                block = self.blocks.blocks[block_id]
                digests = [digest]
                for token in array("q", block.key.tokens):
                    digests.append(chain(digests[-1], token))
                assert self.cache[block_id] == digests[1:], f"block {block_id} holds other tokens than its key says"
                reached.append((block.prefix_id, digests[-1]))
