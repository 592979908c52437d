"""Log-probabilities of tokens and of the likeliest candidates beside them: taken on the device, read on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from nanoflow.core.data.outputs import Logprob
from nanoflow.core.data.sequence import Sequence

ROWS = 64  # of logits at a time, so that many tokens need no more memory than a few


class Span(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        sequence: whose.
        position: index of the first of them in it.
        num_tokens: how many.
        num_candidates: likeliest ones that are wanted for each, 0 to V.
    """

    sequence: Sequence
    position: int
    num_tokens: int
    num_candidates: int


@dataclass(slots=True)
class TopLogprobs:
    """Log-probabilities of L tokens, those of the spans one after the other.

    Attributes:
        spans: which tokens these are.
        ids_LK: int64; the token itself, then the likeliest ones, best first: as many as any span wants.
        logprobs_LK: float32; theirs.
        ranks_L: int64; as `Logprob.rank`, of the token itself.
    """

    spans: list[Span]
    ids_LK: torch.Tensor
    logprobs_LK: torch.Tensor
    ranks_L: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TopLogprobs:
        """The same with each tensor changed, such as copied to the host."""
        return TopLogprobs(self.spans, change(self.ids_LK), change(self.logprobs_LK), change(self.ranks_L))

    def read(self, decode: Callable[[int], str | None]) -> Iterator[tuple[Sequence, int, list[dict[int, Logprob]]]]:
        """For each span its sequence, its position, and for each of its tokens `Logprob`s by token id.

        Args:
            decode: text of a token id. The span's sequence may not want it: see `SamplingParams.detokenize`.
        """
        rows = iter(zip(self.ids_LK.tolist(), self.logprobs_LK.tolist(), self.ranks_L.tolist(), strict=True))
        for span in self.spans:
            width = span.num_candidates + 1
            text = decode if span.sequence.params.detokenize else _no_text
            yield span.sequence, span.position, [
                {  # the first is the token itself, which may be a candidate too
                    token_id: Logprob(logprob, rank if token_id == ids[0] else candidate, text(token_id))
                    for candidate, (token_id, logprob) in enumerate(zip(ids[:width], logprobs[:width], strict=True))
                }
                for ids, logprobs, rank in islice(rows, span.num_tokens)
            ]  # fmt: skip


def top_logprobs(
    spans: list[Span], logits_of: Callable[[slice], torch.Tensor], token_ids_L: torch.Tensor
) -> TopLogprobs:
    """Take log-probabilities of L tokens from raw logits.

    Args:
        spans: which tokens these are; L in all.
        logits_of: gives logits [l, V] of the tokens in a slice, of any float dtype; called for a few at a time.
        token_ids_L: int64; the tokens.
    """
    most = max(span.num_candidates for span in spans)
    parts = []
    for start in range(0, len(token_ids_L), ROWS):
        part = slice(start, start + ROWS)
        logits_LV = logits_of(part).float()
        logprobs_LV = logits_LV.log_softmax(-1)
        ids_L1 = token_ids_L[part].unsqueeze(-1)
        own_L1 = logprobs_LV.gather(-1, ids_L1)
        best = logprobs_LV.topk(most)
        parts.append((
            torch.cat((ids_L1, best.indices), 1), torch.cat((own_L1, best.values), 1), _ranks(logits_LV, ids_L1)
        ))  # fmt: skip
    return TopLogprobs(spans, *(torch.cat(column) for column in zip(*parts, strict=True)))


def _ranks(logits_LV: torch.Tensor, ids_L1: torch.Tensor) -> torch.Tensor:
    """`Logprob.rank` of each token, int64 [L]. Of logits, since some that differ have the same log-probability."""
    own_L1 = logits_LV.gather(-1, ids_L1)
    earlier_LV = torch.arange(logits_LV.shape[-1], device=ids_L1.device) <= ids_L1
    return ((logits_LV > own_L1) | ((logits_LV == own_L1) & earlier_LV)).sum(-1)


def num_candidates(wanted: int, vocab_size: int) -> int:
    """How many candidates `SamplingParams.logprobs` or `prompt_logprobs` stands for, of V."""
    return vocab_size if wanted < 0 else min(wanted, vocab_size)


def _no_text(token_id: int) -> None:
    return None
