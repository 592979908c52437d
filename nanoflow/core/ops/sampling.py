"""Sampling: logits -> token ids, greedy or from the filtered distribution with counter-based random numbers.

A draw is the Gumbel-max trick: argmax of logits / temperature + Gumbel noise. The noise of a candidate is a hash of
(seed of the request, position of the token, candidate id), so that a request draws the same numbers whatever else is
in its batch, however it was chunked, and after a preemption.
"""

from __future__ import annotations

import torch

from nanoflow.core.data.parallel import SINGLE_RANK, ParallelContext
from nanoflow.core.ops.filters import Filters

UINT32 = 0xFFFFFFFF
NO_TOKEN = -1  # instead of a token id: nothing could be sampled
LOWEST_TEMPERATURE = 1e-10  # lower ones, 0 apart, are taken for this one, so that no score overflows


def sample(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    filters: Filters | None = None, last_token_R: torch.Tensor | None = None, targets_S: torch.Tensor | None = None,
    outbox: torch.Tensor | None = None, turn_1: torch.Tensor | None = None, parallel: ParallelContext = SINGLE_RANK,
) -> torch.Tensor:  # fmt: skip
    """Token ids [S], int64, of rows whose parameters lie on the logits' device; may be captured in a CUDA graph.

    A row in which any logit is NaN, or whose best candidate is infinite, gets `NO_TOKEN`.

    Several ranks may each have a part of the logits. They draw from it alone, and compare their best candidates.

    Args:
        logits_SV: left alone.
        temperature_S: float32; 0 is greedy.
        seed_S: int64; any 64 bits.
        position_S: int32 or int64; index of the token to be sampled in its sequence, below 2**32.
        filters: None for none; only where all logits are here.
        last_token_R: int64; the tokens are written there too, at `targets_S` (int64). None writes nothing.
        targets_S: distinct where it matters which token stays.
        outbox: int64 [buffers, S]; the tokens are left there, too, in the buffer whose turn it is; or None.
        turn_1: int32; which step this is, from 1 on; buffers are used in turns.
        parallel: the ranks that have parts of the logits, of one size and in their order. All of them call this, with
            the same parameters, and get the same tokens.
    """
    first = parallel.rank * logits_SV.shape[-1]
    random_N = (temperature_S > 0).nonzero().squeeze(-1)
    if len(random_N) == len(logits_SV):
        best_S, token_S = _scores(logits_SV, temperature_S, seed_S, position_S, filters, first).max(-1)
    else:
        best_S, token_S = logits_SV.float().max(-1)
        if len(random_N):
            rows = (values_S[random_N] for values_S in (logits_SV, temperature_S, seed_S, position_S))
            best = _scores(*rows, filters and filters.take(random_N), first).max(-1)
            best_S[random_N], token_S[random_N] = best
    if parallel.size > 1:
        best_SN, token_SN = (parallel.all_gather(x.unsqueeze(-1)) for x in (best_S, token_S + first))
        best_S, rank_S = best_SN.max(-1)
        token_S = token_SN.gather(-1, rank_S.unsqueeze(-1)).squeeze(-1)
    token_S = token_S.masked_fill_(~best_S.isfinite(), NO_TOKEN)
    if last_token_R is not None:
        last_token_R[targets_S] = token_S
    if outbox is not None and turn_1 is not None:
        outbox[(int(turn_1) - 1) % len(outbox), : len(token_S)] = token_S
    return token_S


def _scores(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    filters: Filters | None, first: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [S, V], of rows with a temperature: the highest is the token. Candidates have the ids from `first` on."""
    scores_SV = logits_SV.float() / temperature_S.clamp(min=LOWEST_TEMPERATURE).unsqueeze(-1)
    if filters is not None:
        scores_SV = filters.apply(scores_SV)
    scores_SV += gumbel_noise(seed_S.unsqueeze(-1), position_S.unsqueeze(-1), scores_SV.shape[-1], first)
    return scores_SV


def gumbel_noise(seed_S1: torch.Tensor, position_S1: torch.Tensor, vocab_size: int, first: int = 0) -> torch.Tensor:
    """Standard Gumbel noise [S, V], float32, a function of (seed, position, candidate id) alone.

    Candidates have the ids from `first` on.
    """
    key = _mix(seed_S1 & UINT32)
    key = _mix(key ^ ((seed_S1 >> 32) & UINT32))
    key = _mix(key ^ position_S1)
    candidates_V = torch.arange(first, first + vocab_size, device=seed_S1.device)
    bits = _mix(_mix(candidates_V ^ key) + key & UINT32)
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # exact, so never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit numbers (in int64) whose every output bit depends on every input bit (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & UINT32
    x = (x ^ (x >> 15)) * 0x846CA68B & UINT32
    return x ^ (x >> 16)
