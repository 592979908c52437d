"""The engine: owns the loop, and the way of a request from its tokens to its output."""

from __future__ import annotations

import xxhash

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.integers import nth_seed
from nanoflow.core.contracts.executor import PendingStep
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.messages import AddRequest, Update
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.command_handler import CommandHandler
from nanoflow.core.engine.request import Request, make_sequences


class Engine(CommandHandler):
    """Runs requests to their end, a step at a time. `EngineParts` says what it is made of, and what it keeps."""

    def submit(self, request: AddRequest) -> None:
        """Queue a request that `admission` has checked; `step` brings its output. `add_request` does both."""
        self._add(request)
        self.output_processor.add(request)

    def _add(self, command: AddRequest) -> None:
        if self.failure is not None:
            raise self._stopped() from self.failure
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

    def _sequences(self, command: AddRequest, names: list[str]) -> list[Sequence]:
        """One for each completion."""
        params, seeds = command.params, command.seeds
        if seeds is None:
            seed = xxhash.xxh3_64_intdigest(f"{self.seed}/{self.num_requests}".encode())
            seeds = [nth_seed(seed, index) for index in range(params.n)]
        return make_sequences(command, names, seeds, self.admission.stop_token_ids(params), self.clock())

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
        if self.failure is not None:
            raise self._stopped() from self.failure
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
