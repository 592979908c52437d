"""Log-probabilities of prompts: which of their tokens a step scores."""

from __future__ import annotations

import numpy as np

from nanoflow.core.data.batch import Batch
from nanoflow.core.sampling.logprobs import Span, num_candidates


def prompt_spans(batch: Batch, vocab_size: int) -> list[Span]:
    """Prompt tokens whose log-probabilities this step brings: those after tokens that it computes."""
    spans = []
    for sequence, start, count in zip(batch.sequences, batch.starts, batch.num_tokens, strict=True):
        first = max(start + 1, sequence.params.prompt_logprobs_start)
        end = min(start + count + 1, sequence.num_prompt_tokens)
        if first < end and sequence.needs_prompt_logits:
            wanted = num_candidates(sequence.params.prompt_logprobs, vocab_size)
            spans.append(Span(sequence, first, end - first, wanted))
    return spans


def scored_tokens(spans: list[Span], batch: Batch, query_start_S1: np.ndarray) -> np.ndarray:
    """Tokens of the step that come before those of the spans: their logits are wanted. int64 [L]"""
    if not spans:
        return np.empty(0, np.int64)
    shifts = query_start_S1[:-1].astype(np.int64) - batch.starts  # from position to place in the step
    shift = dict(zip(batch.sequences, shifts.tolist(), strict=False))
    return np.concatenate([shift[s.sequence] + np.arange(s.position, s.position + s.num_tokens) - 1 for s in spans])


def prompt_tokens(spans: list[Span]) -> np.ndarray:
    """The tokens of the spans, int64 [L]."""
    return np.array([i for s in spans for i in s.sequence.token_ids[s.position : s.position + s.num_tokens]], np.int64)
