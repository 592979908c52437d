"""First come, first served, with chunked prefill mixed into the decode batches.

Iteration-level scheduling comes from Orca (OSDI 2022), recompute preemption from vLLM (SOSP 2023), and the mix of
decodes with prefill chunks under one token budget from Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

from collections import deque

from nanoflow.core.config import SchedulerConfig
from nanoflow.core.interfaces import Scheduler, SchedulerContext
from nanoflow.core.types import Batch, Sequence


class FCFSScheduler(Scheduler):
    """Serves sequences in the order of their arrival.

    Each step first gives every decoding sequence its token, then spends what is left of the budget on prefill chunks of
    running sequences, then admits waiting ones. When blocks run out, the newest running sequence gives way: its blocks
    are freed and it waits, ahead of all that came later, to be computed again.
    """

    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.budget
        self.blocks = context.block_manager
        self.unfinished: dict[str, Sequence] = {}
        self.waiting: deque[Sequence] = deque()  # in order of arrival, and all later than those running
        self.running: list[Sequence] = []  # in order of arrival
        self.preempted: list[Sequence] = []  # since the last batch

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def add(self, sequence: Sequence) -> None:
        self.unfinished[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        sequence = self.unfinished.pop(request_id, None)
        if sequence is not None:
            (self.running if sequence in self.running else self.waiting).remove(sequence)
            self.blocks.free(sequence)
        return sequence

    def schedule(self) -> Batch | None:
        batch = Batch()
        chosen, preempted = self._choose_running()
        for sequence, num_tokens in chosen.items():
            self._enter(batch, sequence, num_tokens)
        if not preempted:  # blocks taken from one sequence must not go to one that came later
            self._admit(batch, self.max_num_batched_tokens - sum(chosen.values()))
        self.preempted += preempted
        if not batch.sequences:
            return None
        batch.preempted, self.preempted = self.preempted, []
        return batch

    def update(self, batch: Batch) -> list[Sequence]:
        finished = []
        for sequence in batch.sequences:
            if self.unfinished.get(sequence.request_id) is not sequence:
                continue  # aborted, or ended by an earlier batch
            self.blocks.commit(sequence)
            if sequence.is_finished:
                self.blocks.free(sequence)
                del self.unfinished[sequence.request_id]
                finished.append(sequence)
        if finished:
            self.running = [s for s in self.running if not s.is_finished]
            self.waiting = deque(s for s in self.waiting if not s.is_finished)
        return finished

    def _choose_running(self) -> tuple[dict[Sequence, int], list[Sequence]]:
        """Tokens for each running sequence that can go on, decodes first, and those that had to give way."""
        chosen: dict[Sequence, int] = {}
        preempted: list[Sequence] = []
        budget = self.max_num_batched_tokens
        decodes = [s for s in self.running if s.num_uncomputed_tokens == 1]
        prefills = [s for s in self.running if s.num_uncomputed_tokens > 1]
        for sequence in decodes + prefills:
            if budget == 0 or not sequence.block_table:
                continue  # nothing left to spend, or it just gave way
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self.blocks.allocate(sequence, num_tokens):
                victim = self.running.pop()
                budget += chosen.pop(victim, 0)
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                chosen[sequence] = num_tokens
                budget -= num_tokens
        return chosen, preempted

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, batch: Batch, budget: int) -> None:
        """Start waiting sequences in order until the first that finds no room."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            num_tokens = min(sequence.num_tokens - self.blocks.match(sequence), budget)
            if not self.blocks.allocate(sequence, num_tokens):
                return
            self.running.append(self.waiting.popleft())
            self._enter(batch, sequence, num_tokens)
            budget -= num_tokens

    def _enter(self, batch: Batch, sequence: Sequence, num_tokens: int) -> None:
        batch.add(sequence, num_tokens)
        self.blocks.commit(sequence)
