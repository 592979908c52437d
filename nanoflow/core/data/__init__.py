"""The data that flows through the engine: sequences, batches and outputs, and how tensors are split over ranks."""

from nanoflow.core.data.batch import AttentionInput, Batch, Projection
from nanoflow.core.data.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput, Score
from nanoflow.core.data.parallel import SINGLE_RANK, Group, ParallelContext, RankPartials, Shard, Share
from nanoflow.core.data.sequence import Sequence

__all__ = [
    "SINGLE_RANK",
    "AttentionInput",
    "Batch",
    "CompletionOutput",
    "EngineStats",
    "Group",
    "Logprob",
    "ParallelContext",
    "Projection",
    "RankPartials",
    "RequestMetrics",
    "RequestOutput",
    "Score",
    "Sequence",
    "Shard",
    "Share",
]
