"""`logit_bias`, `allowed_token_ids`, bad words of one token, and penalties: one pass over the logits serves them all.

What a slot adds to its logits, and how often it has seen each token, lies in tables [R, V] on the device. A table is
made when the first request asks for it, a row of it is filled when a sequence gets the slot, and sampled tokens are
counted where they are, so that a step need not know the values of tokens that an earlier step is still to bring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nanoflow.core.config.errors import RequestError, shown
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.data.transfer import to_device
from nanoflow.core.sampling.logits import GENERATED, IN_PROMPT
from nanoflow.plugins.logits_processors.bad_words import WordTokenizer


class BiasAndPenalties(LogitsProcessor):
    """Biases, then penalties; see the top of this file.

    Attributes:
        bias_RV: float32; -inf is forbidden. None until a request has a bias.
        counts_RV: int32; as by `IN_PROMPT` and `GENERATED`. None until a request has a penalty.
    """

    fields = (
        "logit_bias", "allowed_token_ids", "bad_words", "repetition_penalty", "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    in_place = False  # converts to float32 in the same pass

    def __init__(self, context: LogitsProcessorContext) -> None:
        self.device, self.vocab_size, self.eos_token_ids = context.device, context.vocab_size, context.eos_token_ids
        self.ops, self.word_token_ids = context.ops, WordTokenizer(context)
        self.biased = np.zeros(context.num_slots, bool)
        self.penalized = np.zeros(context.num_slots, bool)
        self.penalties_3R = np.zeros((3, context.num_slots), np.float32)  # repetition, presence, frequency
        self.bias_RV: torch.Tensor | None = None
        self.counts_RV: torch.Tensor | None = None

    def uses(self, params: SamplingParams) -> bool:
        biased = params.logit_bias or params.allowed_token_ids or params.bad_words
        return bool(biased) or params.penalties is not None

    def samples_all(self, params: SamplingParams) -> bool:
        return params.penalties is not None

    def check(self, params: SamplingParams) -> None:
        for name in ("logit_bias", "allowed_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= self.vocab_size:
                    raise RequestError(
                        f"{name}: Token id {shown(token_id)} is not in the vocabulary; "
                        f"ids go from 0 to {self.vocab_size - 1}."
                    )
        if params.allowed_token_ids:
            self._check_allowed(params)

    def _check_allowed(self, params: SamplingParams) -> None:
        """Whether some of `allowed_token_ids` is left to begin with."""
        left = set(params.allowed_token_ids or ()) - set(self._single_tokens(params))
        if not left:
            raise RequestError("bad_words forbid all of allowed_token_ids; allow one more.")
        stops = set(params.stop_token_ids or ()).union(() if params.ignore_eos else self.eos_token_ids)
        if params.min_tokens and not left - stops:
            what = "All that bad_words leave of" if params.bad_words else "All of"
            raise RequestError(
                f"{what} allowed_token_ids are stop tokens, which min_tokens ({params.min_tokens}) forbids at first; "
                f"allow one more."
            )

    def assign(self, slot: int, sequence: Sequence) -> None:
        params = sequence.params
        penalties = params.penalties or (1, 0, 0)
        self.penalized[slot] = params.penalties is not None
        # Values that float32 would round to 0 or infinity are kept short of it.
        self.penalties_3R[:, slot] = np.clip(penalties[0], 1e-6, 1e6), *penalties[1:]
        masked = self._single_tokens(params)
        self.biased[slot] = bool(masked or params.logit_bias or params.allowed_token_ids)
        if self.biased[slot]:
            self._fill_bias(slot, params.allowed_token_ids, params.logit_bias or {}, masked)
        if self.penalized[slot]:
            self._fill_counts(slot, sequence)

    def wants(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.biased[slots] | self.penalized[slots]

    def apply(self, logits_SV: torch.Tensor, rows: LogitsRows) -> torch.Tensor:
        count, slots = len(logits_SV), rows.slots
        slots_S, biased_S = np.zeros(count, np.int64), np.zeros(count, bool)
        penalties_3S = np.zeros((3, count), np.float32)
        penalties_3S[0] = 1
        slots_S[rows.indices], biased_S[rows.indices] = slots, self.biased[slots]
        penalties_3S[:, rows.indices] = self.penalties_3R[:, slots]
        bias_RV = self.bias_RV if biased_S.any() else None
        counts_RV = self.counts_RV if self.penalized[slots].any() else None
        slots_S, biased_S, penalties_3S = (to_device(array, self.device) for array in (slots_S, biased_S, penalties_3S))
        return self.ops.adjust_logits(logits_SV, slots_S, biased_S, bias_RV, penalties_3S, counts_RV)

    def observe(self, slots: np.ndarray, tokens_S: torch.Tensor) -> None:
        if self.counts_RV is not None:  # counts of a slot without penalties are never read
            counts, slots_S = self.counts_RV.view(-1), to_device(slots, self.device)
            places_S = torch.add(tokens_S, slots_S, alpha=self.vocab_size)
            counts.scatter_add_(0, places_S, counts.new_full(tokens_S.shape, GENERATED))

    def _single_tokens(self, params: SamplingParams) -> list[int]:
        """Bad words that are one token."""
        return [word[0] for word in self.word_token_ids(params) if len(word) == 1]

    def _fill_bias(self, slot: int, allowed: list[int] | None, bias: dict[int, float], masked: list[int]) -> None:
        if self.bias_RV is None:
            self.bias_RV = torch.empty(len(self.biased), self.vocab_size, device=self.device)
        bias_V = self.bias_RV[slot]
        bias_V.fill_(-torch.inf if allowed else 0)
        if allowed:
            bias_V.index_fill_(0, self._ids(allowed), 0)
        if bias:
            values = to_device(np.array(list(bias.values()), np.float32), self.device)
            bias_V.index_add_(0, self._ids(list(bias)), values)
        if masked:
            bias_V.index_fill_(0, self._ids(masked), -torch.inf)

    def _fill_counts(self, slot: int, sequence: Sequence) -> None:
        if self.counts_RV is None:
            self.counts_RV = torch.empty(len(self.biased), self.vocab_size, dtype=torch.int32, device=self.device)
        counts_V = self.counts_RV[slot].zero_()
        counts_V.index_fill_(0, self._ids(sequence.token_ids[: sequence.num_prompt_tokens]), IN_PROMPT)
        output = self._ids(sequence.output_token_ids)
        counts_V.scatter_add_(0, output, counts_V.new_full(output.shape, GENERATED))

    def _ids(self, token_ids: list[int]) -> Any:
        return to_device(np.array(token_ids, np.int64), self.device)
