"""The engine: owns the loop, and the way of a request from its tokens to its output."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import xxhash

from nanoflow.core.config.engine_config import EngineConfig
from nanoflow.core.config.errors import NanoflowError, RequestError
from nanoflow.core.config.integers import nth_seed
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.executor import Executor, PendingStep
from nanoflow.core.contracts.observer import Observer
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.messages import AddRequest, Update
from nanoflow.core.data.outputs import EngineStats, RequestOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.admission import Admission
from nanoflow.core.engine.command_handler import CommandHandler
from nanoflow.core.engine.observers import Observers
from nanoflow.core.engine.output_processor import OutputProcessor
from nanoflow.core.engine.preparation import Preparation
from nanoflow.core.engine.request import Request, make_sequences
from nanoflow.core.engine.stop_checker import StopChecker
from nanoflow.core.sampling.logits_processors import LogitsProcessors
from nanoflow.core.text.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow")


class Engine(CommandHandler):
    """Runs requests to their end, a step at a time.

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

    def submit(self, request: AddRequest) -> None:
        """Queue a request that `admission` has checked; `step` brings its output. `add_request` does both."""
        self._add(request)
        self.output_processor.add(request)

    def _add(self, command: AddRequest) -> None:
        self._check_works()
        request_id, params = command.request_id, command.params
        names = [request_id] if params.n == 1 else [f"{request_id}#{index}" for index in range(params.n)]
        if request_id in self.requests or not self.owners.keys().isdisjoint(names):
            raise RequestError(f"There is an unfinished request {request_id!r} already; ids must differ.")
        request = self.requests[request_id] = Request(command, self._sequences(command, names))
        self.num_requests += 1
        try:
            for index, sequence in enumerate(request.sequences):
                self.owners[sequence.request_id] = request, index
                if self.processors.may_use(params) and (begun := self.processors.prepare(sequence)):
                    self.preparing[sequence.request_id] = sequence, begun
                else:
                    self.scheduler.add(sequence)
        except Exception:
            self._withdraw(request)
            raise
        for sequence in request.sequences:
            if params.stop:
                self.stop_checker.add(sequence)
            if self.observers is not None:
                self.observers.tell("on_add", sequence)
        if request.streams or params.stop:
            self.incremental.update(names)

    def _check_works(self) -> None:
        if self.failure is not None:
            what = f"The engine stopped at an earlier error ({self.failure!r}); make a new one."
            raise NanoflowError(what) from self.failure

    def _sequences(self, command: AddRequest, names: list[str]) -> list[Sequence]:
        """One for each completion."""
        params, seeds = command.params, command.seeds
        if seeds is None:
            seed = xxhash.xxh3_64_intdigest(f"{self.seed}/{self.num_requests}".encode())
            seeds = [nth_seed(seed, index) for index in range(params.n)]
        return make_sequences(command, names, seeds, self.admission.stop_token_ids(params), self.clock())

    def _withdraw(self, request: Request) -> None:
        """Forget a request some of whose sequences could not be added."""
        del self.requests[request.request_id]
        for sequence in request.sequences:
            if self.owners.pop(sequence.request_id, None) and not self.preparing.pop(sequence.request_id, None):
                self.scheduler.abort(sequence.request_id)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has, or None if there is no such unfinished request."""
        outputs = self.output_processor.process(self.cancel(request_id))
        return outputs[0] if outputs else None

    def cancel(self, request_id: str) -> list[Update]:
        """`abort`, with the updates left to be processed. The request's blocks are free when this returns."""
        request = self.requests.get(request_id)
        updates = []
        for sequence in request.sequences if request else ():
            if sequence.request_id in self.owners:
                if sequence.request_id in self.preparing:
                    self.preparing.cancel(sequence.request_id)
                else:
                    known = self.scheduler.abort(sequence.request_id)
                    known_or_failed = known is sequence or self.failure is not None
                    assert known_or_failed, f"the scheduler does not know {sequence.request_id!r}"
                sequence.finish("abort")
                first = len(sequence.token_ids) if request.streams else sequence.num_prompt_tokens
                updates.append(self._update(sequence, first, self.clock()))
                self._end(sequence)
        return updates

    # Steps are made.

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

    def step(self) -> list[RequestOutput]:
        """Schedule and submit the next step, take the result of the oldest one, and turn it into outputs.

        Returns outputs of requests that ended with it, and of those that stream and have got something.
        """
        try:
            return self.output_processor.process(self.advance())
        except BaseException as error:
            self.failure = self.failure or error
            self.close_after_failure()
            raise

    def advance(self) -> list[Update]:
        """`step`, with its updates left to be processed. Where it fails, whoever called it closes the engine."""
        self._check_works()
        try:
            updates = self._take_prepared() if self.preparing else []
            batch = self.scheduler.schedule()
            if batch is not None:
                self._submit(batch)
            if batch is None or len(self.in_flight) > self.depth:
                updates += self._take()
            return updates
        except BaseException as error:  # even an interrupt leaves a batch half done, and blocks marked as filled
            self.failure = error
            raise

    def _submit(self, batch: Batch) -> None:
        """Start the step of a batch."""
        if self.observers is not None:
            reasons = (self.scheduler.wait_reason(), self.preparing.wait_reason() if self.preparing else None)
            self.observers.scheduled(batch, [reason for reason in reasons if reason is not None])
        self.in_flight.append((batch, self.executor.submit(batch)))
        num_decodes = batch.num_decodes
        self._stats.num_steps += 1
        self._stats.num_decode_tokens += num_decodes
        self._stats.num_prefill_tokens += batch.total_tokens - num_decodes
        self._stats.num_preemptions += len(batch.preempted)
        if self.observers is not None:
            self.observers.tell("on_submit", batch)

    def _take(self) -> list[Update]:
        """Append the oldest step's tokens to its sequences, end those that are done, and say what there is to show."""
        if not self.in_flight and len(self.owners) == len(self.preparing):
            return []
        assert self.in_flight, f"the scheduler has {len(self.requests)} unfinished requests and runs none of them"
        batch, step = self.in_flight.popleft()
        token_ids = step.result()
        now = self.clock()
        for sequence, position, logprobs in step.logprobs(self._token_text):
            if not sequence.is_finished:
                sequence.add_logprobs(position, logprobs)
        changed = self._end_failed(step) + self._append(batch, token_ids, now)
        if self.stop_checker.texts:
            self.stop_checker.check([s for s, _ in changed if s.request_id in self.stop_checker.texts])
        updates = [self._update(*one, now) for one in changed if self.owners[one[0].request_id][0].streams]
        if self.observers is not None:
            self.observers.tell("on_result", batch)
        for sequence in self.scheduler.update(batch):
            if not self.owners[sequence.request_id][0].streams:
                updates.append(self._update(sequence, sequence.num_prompt_tokens, now))
            self._end(sequence)
        return updates

    def _end_failed(self, step: PendingStep) -> list[tuple[Sequence, int]]:
        """End sequences of which a logits processor failed; returns them as `_append` does."""
        failed = [(sequence, reason) for sequence, reason in step.failures() if not sequence.is_finished]
        for sequence, reason in failed:
            sequence.finish("error", reason)
        return [(sequence, len(sequence.token_ids)) for sequence, _ in failed]

    def _append(self, batch: Batch, token_ids: list[int], now: float) -> list[tuple[Sequence, int]]:
        """Append a step's tokens; returns those of `incremental` that got some, with the places of their first ones."""
        changed = []
        sampling = [s for s, samples in zip(batch.sequences, batch.samples, strict=True) if samples]
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            if sequence.finish_reason is None:
                first = len(sequence.token_ids)
                self._stats.num_output_tokens += sequence.append_token(token_id)
                if first == sequence.num_prompt_tokens < len(sequence.token_ids):
                    sequence.first_token_time = now
                if sequence.request_id in self.incremental:
                    changed.append((sequence, first))
        return changed

    def _update(self, sequence: Sequence, first: int, now: float) -> Update:
        """What its caller shall know of a sequence's tokens from `first` on, and whether it has ended."""
        request, index = self.owners[sequence.request_id]
        text = self.stop_checker.delta(sequence) if sequence.params.stop else None
        return request.update(index, first, text, now)

    def _token_text(self, token_id: int) -> str | None:
        return self.tokenizer.token_text(token_id) if self.tokenizer else None

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        self.executor.release(sequence)
        self.incremental.discard(sequence.request_id)
        if sequence.params.stop:
            self.stop_checker.forget(sequence)
        request, _ = self.owners.pop(sequence.request_id)
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            del self.requests[request.request_id]
        if self.observers is not None:
            self.observers.tell("on_finish", sequence)

    def _take_prepared(self) -> list[Update]:
        """Hand sequences for which all is prepared to the scheduler, and end those for which that failed."""
        ended = []
        idle = len(self.preparing) == len(self.owners) and not self.in_flight
        for sequence in self.preparing.take(may_wait=idle):
            if not sequence.is_finished:
                self.scheduler.add(sequence)
            else:
                ended.append(self._update(sequence, len(sequence.token_ids), self.clock()))
                self._end(sequence)
        return ended

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
