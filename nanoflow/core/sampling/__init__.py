"""From logits to token ids: penalties and masks, filters, draws, log-probabilities."""

from nanoflow.core.sampling.batch_sampler import BatchSampler
from nanoflow.core.sampling.sampler import Sampler

__all__ = [
    "BatchSampler",
    "Sampler",
]
