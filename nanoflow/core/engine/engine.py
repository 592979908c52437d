"""The engine: owns the loop, and the way of a request from its tokens to its output."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

import xxhash

from nanoflow.core.config.errors import NanoflowError, RequestError, one_line, shown
from nanoflow.core.config.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.core.contracts.block_manager import BlockManager
from nanoflow.core.contracts.executor import Executor, PendingStep
from nanoflow.core.contracts.scheduler import Scheduler
from nanoflow.core.data.batch import Batch
from nanoflow.core.data.outputs import EngineStats, RequestOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.engine.output_processor import Renderer, Request, Update
from nanoflow.core.sampling.structured_output import Grammar, GrammarCompiler
from nanoflow.core.text.tokenizer import Tokenizer

LONGEST_WAIT = 0.05  # seconds that a step waits for a grammar if there is nothing else to do


class Engine:
    """Runs requests to their end, a step at a time.

    Args:
        executor: runs batches.
        scheduler: makes them.
        block_manager: the scheduler's; asked for its size and its counters.
        tokenizer: turns output into text; None leaves texts empty.
        vocab_size: V; token ids must lie below it.
        max_model_len: most tokens in a sequence.
        eos_token_ids: ids that end a request unless it ignores them.
        default_params: how to sample where a caller says nothing.
        seed: where requests without a seed get theirs from, with their number.
        depth: steps that may be in flight while the next is scheduled: 1 overlaps host and device, 0 does not.

    Attributes:
        requests: unfinished ones by id.
        owners: of unfinished sequences by their ids: the request, and which of its sequences it is.
        followed: ids of those sequences that are looked at token by token: they stream, or have stop strings.
        render: turns what `advance` returns into outputs; may run in another thread.
    """

    def __init__(
        self, *, executor: Executor, scheduler: Scheduler, block_manager: BlockManager, tokenizer: Tokenizer | None,
        vocab_size: int, max_model_len: int, eos_token_ids: frozenset[int], default_params: SamplingParams, seed: int,
        depth: int,
    ) -> None:  # fmt: skip
        self.executor = executor
        self.scheduler = scheduler
        self.block_manager = block_manager
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.default_params = default_params
        self.seed = seed
        self.depth = depth
        self.grammars = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
        self.compiling: dict[str, tuple[Sequence, Future[Grammar]]] = {}  # the scheduler doesn't know these yet
        self.requests: dict[str, Request] = {}
        self.owners: dict[str, tuple[Request, int]] = {}
        self.followed: set[str] = set()
        self.render = Renderer(tokenizer)
        self.in_flight: deque[tuple[Batch, PendingStep]] = deque()
        self.num_requests = 0
        self.failure: BaseException | None = None
        self._stats = EngineStats()

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    ) -> None:  # fmt: skip
        """Queue a request; `step` brings its output.

        Args:
            request_id: not that of an unfinished request.
            prompt_token_ids: at least one id, each below the vocabulary's size.
            params: how to sample; `n` of them share the blocks of the prompt. `output_kind` is the caller's to heed.
            prompt: its text, to be handed through to the output.
            output_kind: whether outputs come step by step, and what they hold; by default one comes at the end.

        Raises:
            RequestError: it can't be served, with the numbers. Nothing has changed then.
            NanoflowError: the engine failed in an earlier step.
        """
        if self.failure is not None:
            raise NanoflowError(f"The engine stopped at an earlier error ({self.failure!r}); make a new one.")
        names = [request_id] if params.n == 1 else [f"{request_id}#{index}" for index in range(params.n)]
        if request_id in self.requests or not self.owners.keys().isdisjoint(names):
            raise RequestError(f"There is an unfinished request {request_id!r} already; ids must differ.")
        max_tokens = self.check_request(prompt_token_ids, params)
        prompt_token_ids = self._truncated(prompt_token_ids, params)
        seed = params.seed
        if seed is None:
            seed = xxhash.xxh3_64_intdigest(f"{self.seed}/{self.num_requests}".encode())
        bad_words, eos_token_ids = self._bad_words(params), self._eos_token_ids(params)
        # What is asked about the prompt, one of them tells for all.
        others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        sequences = [
            Sequence(
                name,
                prompt_token_ids,
                others if index else params,
                max_tokens=max_tokens,
                stop_token_ids=eos_token_ids | frozenset(params.stop_token_ids or ()),
                bad_words=bad_words,
                seed=_nth_seed(seed, index),
            )
            for index, name in enumerate(names)
        ]
        self.num_requests += 1
        request = self.requests[request_id] = Request(request_id, prompt, output_kind, sequences, self.tokenizer)
        try:
            for index, sequence in enumerate(sequences):
                self.owners[sequence.request_id] = request, index
                if params.structured_outputs is None:
                    self.scheduler.add(sequence)
                else:
                    self.compiling[sequence.request_id] = sequence, self.grammars.submit(params)
        except Exception:
            self._withdraw(request)
            raise
        if request.streams or params.stop:
            self.followed.update(names)

    def _withdraw(self, request: Request) -> None:
        """Forget a request some of whose sequences could not be added."""
        del self.requests[request.request_id]
        for sequence in request.sequences:
            if self.owners.pop(sequence.request_id, None) and not self.compiling.pop(sequence.request_id, None):
                self.scheduler.abort(sequence.request_id)

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens that the request may generate.

        Raises:
            RequestError: it could never be served, with the numbers.
        """
        prompt_token_ids = self._truncated(prompt_token_ids, params)
        length = len(prompt_token_ids)
        if length == 0:
            raise RequestError("The prompt is empty; give at least one token.")
        if length >= self.max_model_len:
            raise RequestError(
                f"The prompt has {length} tokens, but max_model_len is {self.max_model_len}, and at least one is for "
                f"the output; shorten the prompt to {self.max_model_len - 1} tokens."
            )
        self._check_ids("", (min(prompt_token_ids), max(prompt_token_ids), *(params.stop_token_ids or ())))
        self._check_ids("logit_bias: ", params.logit_bias or ())
        self._check_ids("allowed_token_ids: ", params.allowed_token_ids or ())
        if params.stop and self.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and the checkpoint has none; use stop_token_ids.")
        if params.bad_words and self.tokenizer is None:
            raise RequestError("bad_words need a tokenizer, and the checkpoint has none; use logit_bias.")
        room = self.max_model_len - length
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens must be at most {max_tokens}, which is what max_model_len ({self.max_model_len}) leaves "
                f"for the output of a prompt of {length} tokens, got {shown(params.min_tokens)}."
            )
        if params.allowed_token_ids:
            self._check_allowed(params)
        self._bad_words(params)
        if params.structured_outputs is not None:
            self.grammars.check(params.structured_outputs)
        # The last token is sampled and never computed, so it needs no place in the cache.
        size, needed = self.block_manager.block_size, length + max_tokens - 1
        if -(-needed // size) > self.block_manager.num_blocks:
            raise RequestError(
                f"The request needs a KV cache of {needed} tokens (prompt {length}, output up to {max_tokens}), but "
                f"there are {self.block_manager.num_blocks} blocks of {size} tokens; shorten the request, or raise "
                f"engine.num_kv_blocks."
            )
        return max_tokens

    def _check_allowed(self, params: SamplingParams) -> None:
        """Whether some of `allowed_token_ids` is left to begin with."""
        left = set(params.allowed_token_ids or ()) - {word[0] for word in self._bad_words(params) if len(word) == 1}
        if not left:
            raise RequestError("bad_words forbid all of allowed_token_ids; allow one more.")
        if params.min_tokens and not left - set(params.stop_token_ids or ()) - self._eos_token_ids(params):
            what = "All that bad_words leave of" if params.bad_words else "All of"
            raise RequestError(
                f"{what} allowed_token_ids are stop tokens, which min_tokens ({params.min_tokens}) forbids at first; "
                f"allow one more."
            )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token ids of what the output must not hold. What has an id past the model's can't be generated anyway."""
        words = self.tokenizer.word_token_ids(params.bad_words) if self.tokenizer and params.bad_words else []
        return [word for word in words if all(token_id < self.vocab_size for token_id in word)]

    def _eos_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Those that end the request."""
        return frozenset() if params.ignore_eos else self.eos_token_ids

    def _truncated(self, prompt_token_ids: list[int], params: SamplingParams) -> list[int]:
        """The part of the prompt that `truncate_prompt_tokens` leaves."""
        length = params.truncate_prompt_tokens
        if length is None:
            return prompt_token_ids
        if length == -1:
            length = max(1, self.max_model_len - (params.max_tokens or 1))
        return prompt_token_ids[-length:]

    def _check_ids(self, where: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{where}Token id {shown(token_id)} is not in the vocabulary; "
                    f"ids go from 0 to {self.vocab_size - 1}."
                )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has, or None if there is no such unfinished request."""
        outputs = self.render(self.cancel(request_id))
        return outputs[0] if outputs else None

    def cancel(self, request_id: str) -> list[Update]:
        """End a request now, all its sequences; their blocks are free when this returns. Not rendered yet."""
        request = self.requests.get(request_id)
        updates = []
        for index, sequence in enumerate(request.sequences if request else ()):
            if sequence.request_id in self.owners:
                if sequence.request_id in self.compiling:
                    self.compiling.pop(sequence.request_id)[1].cancel()
                else:
                    known = self.scheduler.abort(sequence.request_id)
                    assert known is sequence, f"the scheduler does not know {sequence.request_id!r}"
                sequence.finish("abort")
                self._end(sequence)
                updates.append(request.update(index, [] if request.streams else sequence.output_token_ids))
        return updates

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
        """Schedule and submit the next step, then take the result of the oldest one.

        Returns outputs of requests that ended with it, and of those that stream and have got something.
        """
        return self.render(self.advance())

    def advance(self) -> list[Update]:
        """`step`, with what it brought left to be rendered."""
        try:
            ended = self._take_grammars() if self.compiling else []
            batch = self.scheduler.schedule()
            if batch is not None:
                self.in_flight.append((batch, self.executor.submit(batch)))
                self._count(batch)
            if batch is None or len(self.in_flight) > self.depth:
                ended += self._take()
            return ended
        except BaseException as error:  # even an interrupt leaves a batch half done, and blocks marked as filled
            self.failure = error
            self.close()
            raise

    def close(self) -> None:
        """End the other ranks, if there are any. The engine can't run any more; may be called again."""
        self.executor.close()
        if self.executor.capabilities.device_type == "cuda":
            gc.unfreeze()  # what `build_engine` froze

    def _take(self) -> list[Update]:
        """Append the oldest step's tokens to its sequences, and end those that are done."""
        if not self.in_flight and len(self.owners) == len(self.compiling):
            return []
        assert self.in_flight, f"the scheduler has {len(self.requests)} unfinished requests and runs none of them"
        batch, step = self.in_flight.popleft()
        sampling = [s for s, samples in zip(batch.sequences, batch.samples, strict=True) if samples]
        updates: list[Update] = []
        token_ids = step.result()
        for sequence, position, logprobs in step.logprobs(self._token_text):
            if not sequence.is_finished:
                sequence.add_logprobs(position, logprobs)
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            if not sequence.is_finished:
                num_before = len(sequence.token_ids)
                self._stats.num_output_tokens += sequence.append_token(token_id)
                if sequence.request_id in self.followed:
                    updates += self._follow(sequence, num_before)
        for sequence in self.scheduler.update(batch):
            request, index = self._end(sequence)
            if not request.streams:
                updates.append(request.update(index, sequence.output_token_ids))
        return updates

    def _follow(self, sequence: Sequence, num_before: int) -> list[Update]:
        """Look for stop strings in the sequence's text with its newest tokens, and say what there is to show."""
        request, index = self.owners[sequence.request_id]
        request.texts[index].update()
        return [request.update(index, sequence.token_ids[num_before:])] if request.streams else []

    def _token_text(self, token_id: int) -> str | None:
        return self.tokenizer.token_text(token_id) if self.tokenizer else None

    def _take_grammars(self) -> list[Update]:
        """Hand sequences whose grammar is ready to the scheduler, and end those whose grammar is no good.

        Waits, but not long, only if there is nothing else to do.
        """
        if len(self.compiling) == len(self.owners) and not self.in_flight:
            wait([grammar for _, grammar in self.compiling.values()], LONGEST_WAIT, FIRST_COMPLETED)
        ended = []
        for request_id, (sequence, grammar) in list(self.compiling.items()):
            if not grammar.done():
                continue
            del self.compiling[request_id]
            try:
                sequence.grammar = grammar.result()
            except Exception as error:
                is_meant = isinstance(error, RequestError)
                sequence.finish("error", str(error) if is_meant else f"The grammar can't be used ({one_line(error)}).")
                request, index = self._end(sequence)
                ended.append(request.update(index, []))
            else:
                self.scheduler.add(sequence)
        return ended

    def _end(self, sequence: Sequence) -> tuple[Request, int]:
        """Forget a sequence that ended; returns its request, and which of its sequences it was."""
        self.executor.release(sequence)
        self.followed.discard(sequence.request_id)
        request, index = self.owners.pop(sequence.request_id)
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            del self.requests[request.request_id]
        return request, index

    def _count(self, batch: Batch) -> None:
        num_decodes = batch.num_decodes
        self._stats.num_steps += 1
        self._stats.num_decode_tokens += num_decodes
        self._stats.num_prefill_tokens += batch.total_tokens - num_decodes
        self._stats.num_preemptions += len(batch.preempted)


def _nth_seed(seed: int, index: int) -> int:
    """The signed 64-bit seed of a request's completion: the first one's is the request's own."""
    if index > 0:
        seed = xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode())
    return (seed + 2**63) % 2**64 - 2**63
