"""What an engine is made of and what it keeps: how it begins, what it counts, and how it ends."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.executor import Executor, PendingStep
from nanoflow.core.contracts.observer import Observer
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.outputs import EngineStats
from nanoflow.core.engine.admission import Admission
from nanoflow.core.engine.observers import Observers
from nanoflow.core.engine.output_processor import OutputProcessor
from nanoflow.core.engine.preparation import Preparation
from nanoflow.core.engine.request import Request
from nanoflow.core.engine.stop_checker import StopChecker
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow")


class EngineParts:
    """All that `Engine` works with.

    Args:
        executor: runs batches.
        scheduler: makes them.
        block_manager: the scheduler's; asked for its size and its counters.
        processors: the logits processors, which the executor applies.
        tokenizer: turns output into text; None leaves texts empty.
        vocab_size: V; token ids must lie below it.
        max_model_len: most tokens in a sequence.
        eos_token_ids: ids that end a request unless it ignores them.
        default_params: how to sample where a caller says nothing.
        seed: where requests without a seed get theirs from, with their number.
        depth: steps that may be in flight while the next is scheduled: 1 overlaps host and device, 0 does not.
        clock: gives seconds; all times of requests are read from it.
        observers: told of what happens; none of them costs nothing.
        cache_origin: where the size of the KV cache comes from, and how to raise it.
        limits: options that say how much one request may ask for; None for the defaults.

    Attributes:
        admission: checks requests.
        requests: unfinished ones by id.
        owners: of unfinished sequences by their ids: the request, and which of its sequences it is.
        incremental: ids of those sequences that are looked at token by token: they stream, or have stop strings.
        output_processor: turns what `advance` returns into outputs; may run in another thread.
        unfreezes_gc: whether objects were frozen for it, for which the garbage collector is to look again at the end.
    """

    def __init__(
        self, *, executor: Executor, scheduler: Scheduler, block_manager: BlockManager, processors: LogitsProcessors,
        tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int, eos_token_ids: frozenset[int],
        default_params: SamplingParams, seed: int, depth: int, clock: Callable[[], float] = time.perf_counter,
        observers: Iterable[Observer] = (), cache_origin: str = "; raise engine.num_kv_blocks",
        limits: EngineConfig | None = None,
    ) -> None:  # fmt: skip
        self.executor = executor
        self.scheduler = scheduler
        self.block_manager = block_manager
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.default_params = default_params
        self.processors = processors
        self.admission = Admission(
            tokenizer, processors, vocab_size, max_model_len, eos_token_ids, block_manager.num_blocks,
            block_manager.block_size, default_params, cache_origin, limits or EngineConfig(),
        )  # fmt: skip
        self.seed = seed
        self.depth = depth
        self.clock = clock
        self.observers = Observers.watching(observers, block_manager)
        self.stop_checker = StopChecker(tokenizer)
        self.output_processor = OutputProcessor(tokenizer)
        self.preparing = Preparation(processors)
        self.requests: dict[str, Request] = {}
        self.owners: dict[str, tuple[Request, int]] = {}
        self.incremental: set[str] = set()
        self.in_flight: deque[tuple[Batch, PendingStep]] = deque()
        self.num_requests = 0
        self.failure: BaseException | None = None
        self.unfreezes_gc = False
        self._stats = EngineStats()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self.requests)

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was built."""
        self._stats.num_queried_tokens = self.block_manager.num_queried_tokens
        self._stats.num_hit_tokens = self.block_manager.num_hit_tokens
        return self._stats

    def close_after_failure(self) -> None:
        """`close`, where what is wrong is known: what else goes wrong now is no news to a user."""
        try:
            self.close()
        except Exception as error:
            logger.warning("The engine could not be closed after an error.", exc_info=error)

    def close(self) -> None:
        """End the other ranks and threads, if there are any. The engine can't run any more; may be called again."""
        self.processors.close()
        self.executor.close()
        if self.unfreezes_gc:
            self.unfreezes_gc = False
            gc.unfreeze()
