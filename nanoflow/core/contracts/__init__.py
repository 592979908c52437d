"""What a plugin of each role promises. The docstrings are the specification."""

from nanoflow.core.contracts.attention import AttentionBackend
from nanoflow.core.contracts.attention_context import AttentionContext
from nanoflow.core.contracts.block_manager import BlockManager, BlockManagerContext
from nanoflow.core.contracts.continuous_scheduler import ContinuousScheduler
from nanoflow.core.contracts.executor import Capabilities, Executor, PendingStep
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext, LogitsRows
from nanoflow.core.contracts.model import ModelArch, ModelContext
from nanoflow.core.contracts.observer import Observer, ObserverContext
from nanoflow.core.contracts.operations import OperationsContext, OperationSet
from nanoflow.core.contracts.scheduler import Scheduler, SchedulerContext

__all__ = [
    "AttentionBackend",
    "AttentionContext",
    "BlockManager",
    "BlockManagerContext",
    "Capabilities",
    "ContinuousScheduler",
    "Executor",
    "LogitsProcessor",
    "LogitsProcessorContext",
    "LogitsRows",
    "ModelArch",
    "ModelContext",
    "Observer",
    "ObserverContext",
    "OperationSet",
    "OperationsContext",
    "PendingStep",
    "Scheduler",
    "SchedulerContext",
]
