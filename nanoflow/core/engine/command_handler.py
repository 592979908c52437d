"""Requests as callers of an engine give them, and as commands from another thread or process."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from nanoflow.core.config.errors import NanoflowError, one_line
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.data.messages import AbortRequest, AddRequest, Refusal, Update
from nanoflow.core.engine.admission import Admission

logger = logging.getLogger("nanoflow")


class CommandHandler(ABC):
    """What an engine does with them.

    Attributes:
        admission: checks requests.
    """

    admission: Admission

    @abstractmethod
    def submit(self, request: AddRequest) -> None:
        """Queue a request that was checked, and expect its updates here."""

    @abstractmethod
    def _add(self, command: AddRequest) -> None:
        """Queue a request that was checked."""

    @abstractmethod
    def cancel(self, request_id: str) -> list[Update]:
        """End a request."""

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
