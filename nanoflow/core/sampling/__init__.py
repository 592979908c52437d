"""From logits to token ids: penalties and masks, filters, what is sampled beside graphs, log-probabilities."""

from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.sampling_input import RowParams, SamplingInput

__all__ = [
    "BatchSampler",
    "RowParams",
    "SamplingInput",
]
