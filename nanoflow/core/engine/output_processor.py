"""From updates to outputs: text, tokens, log-probabilities and times as callers see them.

This side knows requests by their ids alone, and may run in another thread, or another process, than the step loop.
"""

from __future__ import annotations

from nanoflow.core.config.sampling_params import RequestOutputKind
from nanoflow.core.data.messages import AddRequest, Refusal, Update
from nanoflow.core.data.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoflow.core.text.detokenizer import IncrementalDetokenizer, extend_all
from nanoflow.core.text.tokenizer import Tokenizer

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class OutputProcessor:
    """Turns updates into outputs. The text of all updates is decoded in one call, but for what the loop has decoded.

    Args:
        tokenizer: None leaves texts empty.

    Attributes:
        requests: unfinished ones, as far as their callers have seen them, by id.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.requests: dict[str, RequestState] = {}

    def add(self, request: AddRequest) -> None:
        """Expect updates of a request."""
        self.requests[request.request_id] = RequestState(request, self.tokenizer)

    def process(self, updates: list[Update | Refusal]) -> list[RequestOutput | Refusal]:
        """Outputs of the requests that have something to show, at most one each, in the order of the updates.

        Updates of several steps must be `merged`. Refusals are handed through.
        """
        if not updates:
            return []
        refusals = [update for update in updates if isinstance(update, Refusal)]
        for refusal in refusals:
            self.requests.pop(refusal.request_id, None)
        brought = [update for update in updates if isinstance(update, Update)] if refusals else updates
        changed: dict[str, list[int]] = {}
        for update, text in zip(brought, self._texts(brought), strict=True):
            self.requests[update.request_id].take(update, text)
            changed.setdefault(update.request_id, []).append(update.index)
        outputs: list[RequestOutput | Refusal] = [*refusals]
        for request_id, indices in changed.items():
            request = self.requests[request_id]
            finished = request.num_unfinished == 0
            if finished:
                del self.requests[request_id]
            if finished or request.output_kind is not FINAL_ONLY:
                outputs.append(request.output(indices, finished))
        return outputs

    def _texts(self, updates: list[Update]) -> list[str]:
        """What each update adds to its completion's text."""
        texts = [update.text or "" for update in updates]
        places, work = [], []
        for place, update in enumerate(updates):
            detokenizer = self.requests[update.request_id].completions[update.index].detokenizer
            if detokenizer is not None:
                shown = update.token_ids[:-1] if update.num_hidden else update.token_ids
                places.append(place)
                work.append((detokenizer, shown, update.finish_reason is not None))
        for place, text in zip(places, extend_all(work), strict=True):
            texts[place] = text
        return texts


class RequestState:
    """A request as far as its caller has seen it, or is about to.

    Args:
        request: what was asked for.
        tokenizer: None leaves texts empty.
    """

    def __init__(self, request: AddRequest, tokenizer: Tokenizer | None) -> None:
        self.request_id = request.request_id
        self.prompt = request.prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.output_kind = request.output_kind
        self.completions = [Completion(request, index, tokenizer) for index in range(request.params.n)]
        self.num_unfinished = request.params.n
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(0.0, None, None, 0)

    def take(self, update: Update, text: str) -> None:
        """Take what is new of a completion, and its text."""
        self.completions[update.index].take(update, text)
        self.num_cached_tokens = update.num_cached_tokens
        if update.prompt_logprobs is not None and (update.prompt_logprobs or self.prompt_logprobs is None):
            self.prompt_logprobs = [*(self.prompt_logprobs or ()), *update.prompt_logprobs]  # outputs have the old one
        self._take_times(update)

    def _take_times(self, update: Update) -> None:
        metrics = self.metrics
        metrics.arrival_time = update.arrival_time
        first = metrics.first_token_time
        if update.first_token_time is not None and (first is None or update.first_token_time < first):
            metrics.first_token_time = update.first_token_time
        if update.finish_time is not None:
            self.num_unfinished -= 1
            metrics.finished_time = max(metrics.finished_time or update.finish_time, update.finish_time)

    def output(self, indices: list[int], finished: bool) -> RequestOutput:
        """What to show of it, given which completions have changed, and whether all have ended."""
        delta = self.output_kind is DELTA
        shown = [self.completions[index] for index in sorted(set(indices))] if delta else self.completions
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[completion.output(delta=delta) for completion in shown],
            finished=finished,
            num_cached_tokens=self.num_cached_tokens,
            metrics=RequestMetrics(
                self.metrics.arrival_time,
                self.metrics.first_token_time,
                self.metrics.finished_time if finished else None,
                sum([completion.num_preemptions for completion in self.completions]),
            ),
        )


class Completion:
    """One completion of a request as far as its caller has seen it, or is about to.

    Attributes:
        detokenizer: makes its text; None where the loop does, to find stop strings in it, and where none is wanted.
        num_shown: tokens and characters that an output held, for deltas.
    """

    def __init__(self, request: AddRequest, index: int, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.num_shown = (0, 0)
        self.num_preemptions = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize and not params.stop:
            self.detokenizer = IncrementalDetokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_token_ids=request.prompt_token_ids
            )

    def take(self, update: Update, text: str) -> None:
        """Take what is new, and its text."""
        self.token_ids += update.token_ids
        self.text += text
        self.num_preemptions = update.num_preemptions
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
        if self.logprobs is not None and update.logprobs:
            self.logprobs += update.logprobs
            for token_id, candidates in zip(update.token_ids, update.logprobs, strict=True):
                self.cumulative_logprob += candidates[token_id].logprob

    def output(self, *, delta: bool) -> CompletionOutput:
        """A copy: all of it, or what was not shown before."""
        num_tokens, num_characters = self.num_shown if delta else (0, 0)
        self.num_shown = len(self.token_ids), len(self.text)
        return CompletionOutput(
            index=self.index,
            text=self.text[num_characters:],
            token_ids=self.token_ids[num_tokens:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[num_tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
