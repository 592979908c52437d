"""Data that flows through the engine: messages, sequences, batches, outputs; how tensors are split over ranks."""

from nanoflow.core.data.attention_input import AttentionInput, Projection
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.messages import AbortRequest, AddRequest, Refusal, Stop, Update
from nanoflow.core.data.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput, Score
from nanoflow.core.data.parallel import SINGLE_RANK, Group, ParallelContext, RankPartials, Shard, Share
from nanoflow.core.data.reasons import PreemptCause, PreemptReason, WaitCause, WaitReason
from nanoflow.core.data.sequence import Sequence

__all__ = [
    "SINGLE_RANK",
    "AbortRequest",
    "AddRequest",
    "AttentionInput",
    "Batch",
    "CompletionOutput",
    "EngineStats",
    "Group",
    "Logprob",
    "ParallelContext",
    "PreemptCause",
    "PreemptReason",
    "Projection",
    "RankPartials",
    "Refusal",
    "RequestMetrics",
    "RequestOutput",
    "Score",
    "Sequence",
    "Shard",
    "Share",
    "Stop",
    "Update",
    "WaitCause",
    "WaitReason",
]
