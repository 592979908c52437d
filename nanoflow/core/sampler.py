"""Logits -> token ids: greedy, or a draw from the filtered distribution with counter-based random numbers.

A draw is the Gumbel-max trick: argmax of logits / temperature + Gumbel noise. The noise of a candidate is a hash of
(seed of the request, position of the token, candidate id), so that a request draws the same numbers whatever else is
in its batch, however it was chunked, and after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

UINT32 = 0xFFFFFFFF


@dataclass(slots=True)
class SamplingInput:
    """Sampling parameters of the S rows that sample. Arrays are on the host, S entries each.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int64; V or more keeps all.
        top_p: float32.
        min_p: float32.
        seed: int64; any 64 bits.
        position: int64; index of the token to be sampled in its sequence.
        forbidden: row -> ids that the row must not sample.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    forbidden: dict[int, list[int]] = field(default_factory=dict)


class Sampler:
    """Stateless; does only the work that some row of the batch asks for."""

    def __call__(self, logits_SV: torch.Tensor, inputs: SamplingInput) -> torch.Tensor:
        """Sampled token ids [S], int64, on the logits' device. May overwrite `logits_SV`."""
        for row, token_ids in inputs.forbidden.items():
            logits_SV[row, token_ids] = -torch.inf
        random_rows = np.flatnonzero(inputs.temperature > 0)
        if len(random_rows) == 0:
            return logits_SV.argmax(-1)
        if len(random_rows) == len(inputs.temperature):
            return self._draw(logits_SV, inputs, random_rows)
        token_ids = logits_SV.argmax(-1)
        rows = torch.from_numpy(random_rows).to(logits_SV.device)
        token_ids[rows] = self._draw(logits_SV[rows], inputs, random_rows)
        return token_ids

    def _draw(self, logits_RV: torch.Tensor, inputs: SamplingInput, rows: np.ndarray) -> torch.Tensor:
        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values[rows]).to(logits_RV.device).unsqueeze(-1)

        scores = logits_RV.float() / column(inputs.temperature)
        vocab_size = scores.shape[-1]
        if (inputs.top_k[rows] < vocab_size).any() or (inputs.top_p[rows] < 1).any():
            scores = keep_top(scores, column(inputs.top_k), column(inputs.top_p))
        if (inputs.min_p[rows] > 0).any():
            scores = keep_likely(scores, column(inputs.min_p))
        return (scores + gumbel_noise(column(inputs.seed), column(inputs.position), vocab_size)).argmax(-1)


def sample(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor
) -> torch.Tensor:
    """A plain draw for every row, greedy where its temperature is 0; needs nothing of the host. Returns int64 [S]."""
    noise_SV = gumbel_noise(seed_S.unsqueeze(-1), position_S.unsqueeze(-1), logits_SV.shape[-1])
    temperature_S1 = temperature_S.unsqueeze(-1)
    scores_SV = logits_SV.float() / temperature_S1.clamp(min=1e-10) + noise_SV
    return torch.where(temperature_S1 > 0, scores_SV, logits_SV.float()).argmax(-1)


def keep_top(scores_SV: torch.Tensor, top_k_S1: torch.Tensor, top_p_S1: torch.Tensor) -> torch.Tensor:
    """-inf for all but the `top_k` best, and of these for all past the first whose probabilities reach `top_p`.

    One sort serves both. Candidates that tie with the last one kept by `top_k` are kept, as in transformers.
    """
    ranked, order = scores_SV.sort(-1, descending=True)
    last = (top_k_S1 - 1).clamp(0, scores_SV.shape[-1] - 1)
    ranked = ranked.masked_fill(ranked < ranked.gather(-1, last), -torch.inf)
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ranked = ranked.masked_fill((before >= top_p_S1) & (top_p_S1 < 1), -torch.inf)
    return torch.empty_like(scores_SV).scatter_(-1, order, ranked)


def keep_likely(scores_SV: torch.Tensor, min_p_S1: torch.Tensor) -> torch.Tensor:
    """-inf for candidates less likely than `min_p` times the likeliest."""
    return scores_SV.masked_fill(scores_SV < scores_SV.amax(-1, keepdim=True) + min_p_S1.log(), -torch.inf)


def gumbel_noise(seed_S1: torch.Tensor, position_S1: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [S, V], float32, a function of (seed, position, candidate id) alone."""
    key = _mix(seed_S1 & UINT32)
    key = _mix(key ^ ((seed_S1 >> 32) & UINT32))
    key = _mix(key ^ position_S1)
    candidates_V = torch.arange(vocab_size, device=seed_S1.device)
    bits = _mix(_mix(candidates_V ^ key) + key & UINT32)
    uniform = ((bits >> 8).float() + 0.5) * 2.0**-24  # never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit numbers (in int64) whose every output bit depends on every input bit (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & UINT32
    x = (x ^ (x >> 15)) * 0x846CA68B & UINT32
    return x ^ (x >> 16)
