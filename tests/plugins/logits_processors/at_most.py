"""A third party's logits processor, as small as it may be, and one that fails wherever it is told to."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from nanoflow import Component, hookimpl
from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.sequence import Sequence


class AtMost(LogitsProcessor):
    """No token of the output more often than `times`; with `after`, only once the sequence has so many tokens."""

    def __init__(self, config: Any, context: LogitsProcessorContext) -> None:
        self.counts_RV = torch.zeros(context.num_slots, context.vocab_size, dtype=torch.int64, device=context.device)
        self.times_R1 = torch.zeros(context.num_slots, 1, dtype=torch.int64, device=context.device)
        self.after = np.zeros(context.num_slots, np.int64)

    def check(self, params: SamplingParams) -> None:
        times = self.arguments(params).get("times")
        if not isinstance(times, int) or times < 1:
            raise RequestError(f"at_most needs times, an integer >= 1, got {times!r}.")

    def assign(self, slot: int, sequence: Sequence) -> None:
        arguments = self.arguments(sequence.params)
        self.times_R1[slot], self.after[slot] = arguments["times"], arguments.get("after", 0)
        self.counts_RV[slot] = (
            torch.tensor(sequence.output_token_ids).long().bincount(minlength=self.counts_RV.shape[1])
        )

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return positions >= self.after[slots]

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        used_up_NV = self.counts_RV[rows.slots] >= self.times_R1[rows.slots]
        logits_SV[rows.indices] = logits_SV[rows.indices].masked_fill(used_up_NV, -torch.inf)

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        self.counts_RV[slots, tokens_S] += 1


class Newest(LogitsProcessor):
    """Never the same token twice in a row; looks at the tokens themselves."""

    needs_values = True

    def __init__(self, config: Any, context: LogitsProcessorContext) -> None:
        pass

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        for index, position, sequence in zip(rows.indices, rows.positions, rows.sequences, strict=True):
            assert len(sequence.token_ids) == position
            logits_SV[index, sequence.token_ids[-1]] = -torch.inf


class Fails(LogitsProcessor):
    """Raises in the method that a request names, from its third output token on where that is one of each step."""

    def __init__(self, config: Any, context: LogitsProcessorContext) -> None:
        self.where: dict[int, tuple[str, int]] = {}

    def _raise(self, where: str, given: str) -> None:
        if where == given:
            raise ZeroDivisionError(f"in {where}")

    def uses(self, params: SamplingParams) -> bool:
        used = super().uses(params)
        if used and self.arguments(params)["where"] == "uses":
            raise ZeroDivisionError("in uses")
        return used

    def check(self, params: SamplingParams) -> None:
        self._raise("check", self.arguments(params)["where"])

    def prepare(self, sequence: Sequence) -> Future[Any]:
        where = self.arguments(sequence.params)["where"]
        self._raise("prepare", where)
        future: Future[Any] = Future()
        if where == "future":
            future.set_exception(ZeroDivisionError("in future"))
        elif where == "refused":
            future.set_exception(RequestError("It turned out to be bad."))
        else:
            future.set_result(None)
        return future

    def assign(self, slot: int, sequence: Sequence) -> None:
        where = self.arguments(sequence.params)["where"]
        self._raise("assign", where)
        self.where[slot] = where, sequence.num_prompt_tokens + 3

    def _now(self, what: str, slots: Any, positions: Any) -> None:
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            where, least = self.where[slot]
            if position >= least:
                self._raise(what, where)

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._now("wants", slots, positions)
        return np.ones(len(slots), bool)

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> None:
        logits_SV[rows.indices] += 1  # is half done when it raises
        self._now("apply", rows.slots, rows.positions)
        logits_SV[rows.indices] -= 1

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        self._now("observe", slots, np.full(len(slots), 10**6))

    def release(self, slot: int) -> None:
        self._raise("release", self.where.pop(slot)[0])


@hookimpl
def nanoflow_logits_processors() -> list[Component]:
    return [
        Component("at_most", build=AtMost), Component("newest", build=Newest), Component("fails", build=Fails),
        Component("broken", build=lambda config, context: 1 / 0),
    ]  # fmt: skip
