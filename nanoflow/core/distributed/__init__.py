"""The ranks that share a model: their processes, how they find each other, and how they exchange tensors."""

from nanoflow.core.distributed.launch import form_rank_group, rank_device
from nanoflow.core.distributed.process_group import make_group
from nanoflow.core.distributed.rank_group import Driver, RankGroup, Worker

__all__ = [
    "Driver",
    "RankGroup",
    "Worker",
    "form_rank_group",
    "make_group",
    "rank_device",
]
