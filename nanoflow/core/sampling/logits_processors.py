"""The logits processors of an engine, from a request to its slot, and what becomes of requests where one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from nanoflow.core.config.errors import RequestError, one_line
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsRows
from nanoflow.core.data.constraint import Constraint
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.sampling.processor_choice import ProcessorChoice

logger = logging.getLogger("nanoflow")


class ProcessorFailed(Exception):
    """A processor raised this error.

    Args:
        index: which processor.
    """

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__()
        self.index, self.error = index, error


class LogitsProcessors(ProcessorChoice):
    """The logits processors of P plugins, for R slots.

    Args:
        by_name: as in `ProcessorChoice`.
        num_slots: R.

    Attributes:
        used: bool numpy array [R]; whether any processor is used by the sequence of each slot.
    """

    def __init__(self, by_name: Mapping[str, LogitsProcessor], num_slots: int) -> None:
        super().__init__(by_name)
        self.used_PR = np.zeros((len(self.processors), num_slots), bool)
        self.used = np.zeros(num_slots, bool)
        self.observes = [type(p).observe is not LogitsProcessor.observe for p in self.processors]
        self.sequences: list[Any] = [None] * num_slots  # that of each slot; None where it is nobody's
        self.failures: list[tuple[Sequence, str]] = []

    def check(self, params: SamplingParams) -> None:
        """See whether a request can be served; from any thread.

        Raises:
            RequestError: it can't; says why.
        """
        for name in params.logits_processors or ():
            if not self.by_name[name].uses(params):
                raise RequestError(
                    f"logits_processors: {name!r} is not chosen by name; it follows other fields of the parameters."
                )
        for processor in self.processors:
            if processor.uses(params):
                processor.check(params)

    def prepare(self, sequence: Sequence) -> list[tuple[str, Future[Constraint | None]]]:
        """Tell a new sequence what its processors need, and begin what they prepare: names and futures."""
        begun: list[tuple[str, Future[Constraint | None]]] = []
        for processor in self.processors:
            if processor.uses(sequence.params):
                sequence.needs_values |= processor.needs_values
                sequence.samples_all |= processor.samples_all(sequence.params)
                if (future := processor.prepare(sequence)) is not None:
                    begun.append((processor.name, future))
        return begun

    def finish_preparing(self, sequence: Sequence, begun: list[tuple[str, Future[Constraint | None]]]) -> bool:
        """Take what was prepared, all of which is done; False if something failed, and ended the sequence."""
        for name, future in begun:
            try:
                constraint = future.result()
                if constraint is not None and sequence.constraint is not None:
                    raise RequestError(f"The logits processor {name!r} can't hold an output that another one holds.")
                sequence.constraint = constraint or sequence.constraint
            except Exception as error:
                sequence.finish("error", _sentence(name, error))
                return False
        return True

    def assign(self, slot: int, sequence: Sequence) -> None:
        """The slot is this sequence's from now on."""
        self.sequences[slot] = sequence
        for index, processor in enumerate(self.processors):
            try:
                if processor.uses(sequence.params):
                    self.used_PR[index, slot] = self.used[slot] = True
                    processor.assign(slot, sequence)
            except Exception as error:
                self._fail([slot], index, error)
                return

    def release(self, slot: int) -> None:
        """The slot is nobody's."""
        self._withdraw(slot)
        self.sequences[slot] = None

    def _withdraw(self, slot: int) -> None:
        """The slot uses no processor any more."""
        for index in np.flatnonzero(self.used_PR[:, slot]).tolist():
            with suppress(Exception):  # its request has ended, or goes on in another slot
                self.processors[index].release(slot)
        self.used_PR[:, slot] = self.used[slot] = False

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which processors are to change the logits of which slots, bool [P, S]."""
        wanted_PS = self.used_PR[:, slots]
        for index in np.flatnonzero(wanted_PS.any(1)).tolist():
            rows = np.flatnonzero(wanted_PS[index])
            asked = slots[rows]
            answer = self._guarded(index, asked, self.processors[index].wants, asked, positions[rows])
            wanted_PS[index, rows] = False if answer is None else answer
        return wanted_PS

    def apply(
        self, logits_SV: torch.Tensor, slots: np.ndarray, positions: np.ndarray, wanted_PS: np.ndarray
    ) -> torch.Tensor:
        """Logits [S, V], float32, as these slots want them.

        Args:
            logits_SV: left alone.
            slots: int64 [S].
            positions: int64 [S]; index of the token to be sampled in its sequence.
            wanted_PS: as from `wants`.
        """
        try:
            return self._apply(logits_SV, slots, positions, wanted_PS)
        except ProcessorFailed as failure:
            if len(slots) == 1:
                self._fail(slots, failure.index, failure.error)
                return logits_SV.float()
        alone = [slice(row, row + 1) for row in range(len(slots))]
        return torch.cat([self.apply(logits_SV[s], slots[s], positions[s], wanted_PS[:, s]) for s in alone])

    def _apply(
        self, logits_SV: torch.Tensor, slots: np.ndarray, positions: np.ndarray, wanted_PS: np.ndarray
    ) -> torch.Tensor:
        changed_SV = None
        for index in np.flatnonzero(wanted_PS.any(1)).tolist():
            processor, indices = self.processors[index], np.flatnonzero(wanted_PS[index])
            its_slots = slots[indices]
            rows = LogitsRows(indices, its_slots, positions[indices], [self.sequences[s] for s in its_slots.tolist()])
            if processor.in_place and changed_SV is None:
                changed_SV = torch.empty(logits_SV.shape, dtype=torch.float32, device=logits_SV.device)
                changed_SV.copy_(logits_SV)
            try:
                result = processor.apply(logits_SV if changed_SV is None else changed_SV, rows)
            except Exception as error:
                raise ProcessorFailed(index, error) from error
            if not processor.in_place:
                changed_SV = result
        assert changed_SV is not None, "no processor wants any of these rows"
        return changed_SV

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        """These slots, distinct ones, sampled these tokens (int64; -1: none, and what is told of it does not count)."""
        used_PS, tokens_S = self.used_PR[:, slots], tokens_S.clamp(min=0)
        for index in np.flatnonzero(used_PS.any(1)).tolist():
            if self.observes[index]:
                rows = np.flatnonzero(used_PS[index])
                its_tokens = tokens_S if len(rows) == len(slots) else tokens_S[to_device(rows, tokens_S.device)]
                self._guarded(index, slots[rows], self.processors[index].observe, slots[rows], its_tokens)

    def close(self) -> None:
        """Let processors end what they started. None is used any more; may be called again."""
        for processor in self.processors:
            try:
                processor.close()
            except Exception as error:
                logger.warning("The logits processor %r could not be closed.", processor.name, exc_info=error)

    def take_failures(self) -> list[tuple[Sequence, str]]:
        """Sequences of which a processor failed since the last call, and a sentence about it."""
        failures, self.failures = self.failures, []
        return failures

    def _guarded(self, index: int, slots: np.ndarray, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call gives; None if it raises, which ends the sequences of these slots."""
        try:
            return call(*arguments)
        except Exception as error:
            self._fail(slots, index, error)
            return None

    def _fail(self, slots: Iterable[int], index: int, error: Exception) -> None:
        """End the sequences of these slots; what is left of their steps goes on without processors."""
        for slot in map(int, slots):
            sequence = self.sequences[slot]
            assert sequence is not None, "a slot that uses a processor is some sequence's"
            self.failures.append((sequence, _sentence(self.processors[index].name, error)))
            self._withdraw(slot)


def _sentence(name: str, error: Exception) -> str:
    if isinstance(error, RequestError):
        return str(error)
    return f"The logits processor {name!r} failed ({one_line(error)})."
