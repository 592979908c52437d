"""Requests as callers of an engine give and withdraw them, and as commands from another thread or process."""

from __future__ import annotations

import logging
from abc import abstractmethod

from nanoflow.core.config.errors import NanoflowError, one_line
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AbortRequest, AddRequest, Refusal, Update
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.engine_parts import EngineParts
from nanoflow.core.engine.request import Request

logger = logging.getLogger("nanoflow")


class CommandHandler(EngineParts):
    """What an engine does with them."""

    @abstractmethod
    def submit(self, request: AddRequest) -> None:
        """Queue a request that was checked, and expect its updates here."""

    @abstractmethod
    def _add(self, command: AddRequest) -> None:
        """Queue a request that was checked."""

    @abstractmethod
    def _update(self, sequence: Sequence, first: int, now: float) -> Update:
        """What its caller shall know of a sequence's tokens from `first` on."""

    @abstractmethod
    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> None:  # fmt: skip
        """Queue a request; `step` brings its output.

        Args:
            request_id: not that of an unfinished request.
            prompt_token_ids: at least one id, each below the vocabulary's size.
            params: how to sample; `n` of them share the blocks of the prompt. `output_kind` is the caller's to heed.
            prompt: its text, to be handed through to the output.
            output_kind: whether outputs come step by step, and what they hold; by default one comes at the end.

        Raises:
            RequestError: it can't be served, with the numbers. Nothing has changed then.
            NanoflowError: the engine failed in an earlier step.
        """
        self.submit(self.admission.request(request_id, prompt_token_ids, params, prompt, output_kind))

    def _take_prepared(self) -> list[Update]:
        """Hand sequences for which all is prepared to the scheduler, and end those for which that failed."""
        ended = []
        idle = len(self.preparing) == len(self.owners) and not self.in_flight
        for sequence in self.preparing.take(may_wait=idle):
            if not sequence.is_finished:
                self.scheduler.add(sequence)
            else:
                ended.append(self._update(sequence, len(sequence.token_ids), self.clock()))
                self._end(sequence)
        return ended

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has, or None if there is no such unfinished request."""
        outputs = self.output_processor.process(self.cancel(request_id))
        return outputs[0] if outputs else None

    def cancel(self, request_id: str) -> list[Update]:
        """`abort`, with the updates left to be processed. The request's blocks are free when this returns."""
        request = self.requests.get(request_id)
        updates = []
        for sequence in request.sequences if request else ():
            if sequence.request_id in self.owners:
                if sequence.request_id in self.preparing:
                    self.preparing.cancel(sequence.request_id)
                else:
                    known = self.scheduler.abort(sequence.request_id)
                    known_or_failed = known is sequence or self.failure is not None
                    assert known_or_failed, f"the scheduler does not know {sequence.request_id!r}"
                sequence.finish("abort")
                first = len(sequence.token_ids) if request.streams else sequence.num_prompt_tokens
                updates.append(self._update(sequence, first, self.clock()))
                self._end(sequence)
        return updates

    def _withdraw(self, request: Request) -> None:
        """Forget a request some of whose sequences could not be added."""
        del self.requests[request.request_id]
        for sequence in request.sequences:
            if self.owners.pop(sequence.request_id, None) and not self.preparing.pop(sequence.request_id, None):
                self.scheduler.abort(sequence.request_id)

    def _stopped(self) -> NanoflowError:
        """What to raise where a step failed before."""
        return NanoflowError(f"The engine stopped at an earlier error ({self.failure!r}); make a new one.")

    def handle(self, command: AddRequest | AbortRequest) -> list[Update | Refusal]:
        """Carry out a command whose sender has an output processor of its own, for which this returns updates."""
        if isinstance(command, AbortRequest):
            return self.cancel(command.request_id)
        try:
            self._add(command)
        except Exception as error:  # whatever is wrong with it is told to its own caller: others go on
            if isinstance(error, NanoflowError):
                return [Refusal(command.request_id, str(error))]
            logger.warning("request %s was refused", command.request_id, exc_info=error)
            what = f"The request can't be served ({one_line(error)}); change it, or leave it out."
            return [Refusal(command.request_id, what)]
        return []
