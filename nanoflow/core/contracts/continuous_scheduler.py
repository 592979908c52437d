"""Continuous batching, with chunked prefill mixed into the decode batches: all of a scheduler but its preferences.

Iteration-level scheduling comes from Orca (OSDI 2022), recompute preemption from vLLM (SOSP 2023), and the mix of
decodes with prefill chunks under one token budget from Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

from nanoflow.core.config.engine_config import SchedulerConfig
from nanoflow.core.contracts.scheduler import SchedulerContext
from nanoflow.core.contracts.waiting_line import Place, WaitingLine
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.sequence import Sequence


class ContinuousScheduler(WaitingLine):
    """Serves sequences in the order of their ranks; a scheduler derives from it and says what these are.

    Each step first gives every decoding sequence its token, then spends what is left of the budget on prefill chunks of
    running sequences, then admits waiting ones. When blocks run out, the running sequence of the last rank gives way:
    its blocks are freed and it waits, in its old place, to be computed again. So the sequence of the first rank always
    goes on, and nobody starves as long as newcomers' ranks grow: any rank is the first one in the end.

    Attributes:
        num_steps: calls of `schedule` so far; a clock that runs alike whatever the machine.
    """

    def __init__(self, config: SchedulerConfig, context: SchedulerContext) -> None:
        super().__init__(config.max_num_seqs, context.block_manager)
        self.max_num_batched_tokens = config.budget
        self.num_steps = 0
        self.num_added = 0
        self.unfinished: dict[str, Place] = {}

    @abstractmethod
    def rank(self, sequence: Sequence) -> Any:
        """Where a new sequence stands in line; asked once. Smaller is earlier, and equal ranks go by arrival."""

    def candidates(self) -> Iterable[Place]:
        """Waiting sequences in the order in which to admit them; by default by rank.

        Asked once a step, if there is room in the batch. The first that finds no blocks ends the admission.
        """
        return self.waiting[: self.max_num_seqs - len(self.running)]

    def add(self, sequence: Sequence) -> None:
        place = Place(self.rank(sequence), self.num_added, sequence)
        self.num_added += 1
        self.unfinished[sequence.request_id] = place
        insort(self.waiting, place)

    def abort(self, request_id: str) -> Sequence | None:
        place = self.unfinished.get(request_id)
        if place is None:
            return None
        self._let_go(place)
        return place.sequence

    def schedule(self) -> Batch | None:
        self.num_steps += 1
        batch = Batch()
        num_preempted = len(self.preempted)
        chosen = self._choose_running()
        for sequence, num_tokens in chosen.items():
            self._enter(batch, sequence, num_tokens)
        self.refused, self.budget_left = None, self.max_num_batched_tokens - sum(chosen.values())
        self.gave_way = len(self.preempted) > num_preempted
        if not self.gave_way:  # blocks taken from one sequence must not go to one behind it
            self._admit(batch)
        if not batch.sequences:
            return None
        batch.preempted, self.preempted = self.preempted, []
        batch.preempt_reasons, self.preempt_reasons = self.preempt_reasons, []
        return batch

    def update(self, batch: Batch) -> list[Sequence]:
        finished = []
        for sequence in batch.sequences:
            place = self.unfinished.get(sequence.request_id)
            if place is None or place.sequence is not sequence:
                continue  # aborted, or ended by an earlier batch
            self.blocks.commit(sequence)
            if sequence.is_finished:
                self._let_go(place)
                finished.append(sequence)
        return finished

    def _let_go(self, place: Place) -> None:
        del self.unfinished[place.sequence.request_id]
        _remove(self.running if place.sequence.block_table else self.waiting, place)
        self.blocks.free(place.sequence)

    def _choose_running(self) -> dict[Sequence, int]:
        """Tokens for each running sequence that can go on, decodes first; others may have to give way."""
        chosen: dict[Sequence, int] = {}
        budget = self.max_num_batched_tokens
        decodes, prefills = [], []
        for _, _, sequence in self.running:
            if num_tokens := sequence.num_uncomputed_tokens:
                decodes_next = num_tokens == 1 and sequence.num_output_tokens > 0
                (decodes if decodes_next else prefills).append(sequence)
        for sequence in decodes + prefills:
            if budget == 0 or not sequence.block_table:
                continue  # nothing left to spend, or it just gave way
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            while not self.blocks.allocate(sequence, num_tokens):
                victim = self.running.pop()
                budget += chosen.pop(victim.sequence, 0)
                self._preempt(victim, sequence, num_tokens)
                if victim.sequence is sequence:
                    break
            else:
                chosen[sequence] = num_tokens
                budget -= num_tokens
        return chosen

    def _admit(self, batch: Batch) -> None:
        """Start waiting sequences in order until the first that finds no room."""
        if not self.waiting or self.budget_left == 0 or len(self.running) == self.max_num_seqs:
            return
        for place in self.candidates():
            sequence = place.sequence
            num_tokens = min(sequence.num_tokens - self.blocks.match(sequence), self.budget_left)
            if not self.blocks.allocate(sequence, num_tokens):
                self.refused = sequence, num_tokens
                return
            _remove(self.waiting, place)
            insort(self.running, place)
            self._enter(batch, sequence, num_tokens)
            self.budget_left -= num_tokens
            if self.budget_left == 0 or len(self.running) == self.max_num_seqs:
                return

    def _enter(self, batch: Batch, sequence: Sequence, num_tokens: int) -> None:
        batch.add(sequence, num_tokens)
        self.blocks.commit(sequence)


def _remove(line: list[Place], place: Place) -> None:
    del line[bisect_left(line, place)]
