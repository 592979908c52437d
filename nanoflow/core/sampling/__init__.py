"""From logits to token ids: logits processors, filters, what is sampled beside graphs, log-probabilities."""

from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.sampling.sampling_input import RowParams, SamplingInput

__all__ = [
    "BatchSampler",
    "LogitsProcessors",
    "RowParams",
    "SamplingInput",
]
