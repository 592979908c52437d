"""A request: what the step loop brings to it, and what its caller is shown of that.

The two sides may be two threads. The loop owns the sequences, and hands on what a step brought as `Update`s, which are
copies; whoever shows outputs owns the completions. So text is decoded while the loop goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.core.config.sampling_params import RequestOutputKind
from nanoflow.core.data.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.text.stop_strings import OutputText
from nanoflow.core.text.tokenizer import IncrementalDetokenizer, Tokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


class Request:
    """One request and its sequences, one for each of its `n` completions.

    Args:
        request_id: the caller's name for it.
        prompt: the prompt's text, if it has one.
        output_kind: when and how the caller wants outputs.
        sequences: in the order of the completions' indices.
        tokenizer: None leaves texts empty.

    Attributes:
        texts: of the sequences; those with stop strings are followed by the loop, since they end their sequences.
        num_unfinished: sequences that have not ended; the loop's.
        completions: what is known to the side that shows outputs; its own.
    """

    def __init__(
        self, request_id: str, prompt: str | None, output_kind: RequestOutputKind, sequences: list[Sequence],
        tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.prompt = prompt
        self.output_kind = output_kind
        self.sequences = sequences
        self.texts = [OutputText(tokenizer, sequence) for sequence in sequences]
        self.num_unfinished = len(sequences)
        self.completions = [Completion(sequence, index, tokenizer) for index, sequence in enumerate(sequences)]

    @property
    def streams(self) -> bool:
        """Whether there are outputs before it has ended."""
        return self.output_kind is not FINAL_ONLY

    def update(self, index: int, token_ids: list[int]) -> Update:
        """What the caller shall know of new tokens of the sequence at `index`, and whether it has ended."""
        sequence, text = self.sequences[index], self.texts[index]
        news = text.news() if text.stop and self.streams else None
        shown = token_ids[:-1] if text.hides_last_token else token_ids
        return Update(self, index, token_ids, shown, news, sequence.finish_reason, sequence.stop_reason)

    def output(self, indices: list[int]) -> RequestOutput:
        """What to show of it, given which completions have news; a delta is shown once."""
        shown = self.completions
        if self.output_kind is DELTA:
            shown = [self.completions[index] for index in sorted(set(indices))]
        sequences, first = self.sequences, self.sequences[0]
        finished = all(completion.finish_reason for completion in self.completions)
        first_tokens = [s.first_token_time for s in sequences if s.first_token_time is not None]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
            prompt_logprobs=first.prompt_logprobs,
            outputs=[completion.output(delta=self.output_kind is DELTA) for completion in shown],
            finished=finished,
            num_cached_tokens=max(0, first.num_cached_tokens),
            metrics=RequestMetrics(
                first.arrival_time,
                min(first_tokens, default=None),
                max(s.finish_time or 0.0 for s in sequences) if finished else None,
                sum(s.num_preemptions for s in sequences),
            ),
        )


@dataclass(slots=True)
class Update:
    """What a step, or several, brought to a sequence, as of that step: it may be further on when this is read.

    Attributes:
        request: whose sequence it is.
        index: which of its sequences.
        token_ids: new ones; all of the output for a request that shows only its end.
        shown: those of them whose text is shown.
        text: what they add to the text, where the loop follows it; None where it is still to be decoded.
        finish_reason, stop_reason: as in `CompletionOutput`.
    """

    request: Request
    index: int
    token_ids: list[int]
    shown: list[int]
    text: str | None
    finish_reason: str | None
    stop_reason: str | int | None


def merged(updates: list[Update]) -> list[Update]:
    """The same news with one update a sequence, in the order of the first ones, which take the others in."""
    found: dict[tuple[Request, int], Update] = {}
    for update in updates:
        first = found.setdefault((update.request, update.index), update)
        if first is not update:
            first.token_ids = first.token_ids + update.token_ids
            first.shown = first.shown + update.shown
            if first.text is not None:
                first.text += update.text or ""
            first.finish_reason, first.stop_reason = update.finish_reason, update.stop_reason
    return list(found.values())


class Completion:
    """A completion as far as it was shown, or is about to be."""

    def __init__(self, sequence: Sequence, index: int, tokenizer: Tokenizer | None) -> None:
        params = sequence.params
        self.logprobs = None if params.logprobs is None else sequence.logprobs  # grows as the sequence does
        self.skip_special_tokens = params.skip_special_tokens
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.num_shown = (0, 0)  # tokens and characters, for deltas
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.detokenizer: IncrementalDetokenizer | None = None
        if tokenizer and params.detokenize:
            self.detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)

    def add(self, update: Update, text: str) -> None:
        """Take a sequence's news, and their text."""
        self.token_ids += update.token_ids
        self.text += text
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason

    def output(self, *, delta: bool) -> CompletionOutput:
        """A copy: all of it, or what was not shown before."""
        num_tokens, num_characters = self.num_shown if delta else (0, 0)
        self.num_shown = len(self.token_ids), len(self.text)
        known = None if self.logprobs is None else self.logprobs[: len(self.token_ids)]
        return CompletionOutput(
            index=self.index,
            text=self.text[num_characters:],
            token_ids=self.token_ids[num_tokens:],
            cumulative_logprob=None if known is None else _sum(self.token_ids, known),
            logprobs=None if known is None else known[num_tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _sum(token_ids: list[int], logprobs: list[dict[int, Logprob]]) -> float:
    return sum(candidates[token_id].logprob for token_id, candidates in zip(token_ids, logprobs, strict=True))


class Renderer:
    """Turns updates into outputs; all text that no stop string depends on is decoded here, in one call.

    Args:
        tokenizer: None leaves texts empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, updates: list[Update]) -> list[RequestOutput]:
        """Outputs of the requests that have something to show, at most one each, in the order of the updates.

        Updates of several steps must be `merged`.
        """
        if not updates:
            return []
        news: dict[Request, list[int]] = {}
        for update, text in zip(updates, self._texts(updates), strict=True):
            update.request.completions[update.index].add(update, text)
            news.setdefault(update.request, []).append(update.index)
        return [
            request.output(indices) for request, indices in news.items()
            if request.streams or all(completion.finish_reason for completion in request.completions)
        ]  # fmt: skip

    def _texts(self, updates: list[Update]) -> list[str]:
        """What each update adds to its completion's text."""
        texts = [update.text if update.text is not None else "" for update in updates]
        if self.tokenizer is None:
            return texts
        for skip in (True, False):  # special tokens
            chosen = [
                (place, completion.detokenizer) for place, update in enumerate(updates)
                if update.text is None and update.request.streams
                and (completion := update.request.completions[update.index]).detokenizer is not None
                and completion.skip_special_tokens == skip
            ]  # fmt: skip
            windows = [window for place, one in chosen for window in one.extend(updates[place].shown)]
            decoded = self.tokenizer.decode_all(windows, skip_special_tokens=skip) if windows else []
            pairs = zip(decoded[::2], decoded[1::2], strict=True)
            for (place, detokenizer), (text, kept) in zip(chosen, pairs, strict=True):
                texts[place] = detokenizer.settle(text, kept)
                if updates[place].finish_reason:
                    texts[place] += detokenizer.flush()
        for place, update in enumerate(updates):
            if not update.request.streams:
                texts[place] = update.request.texts[update.index].final()
        return texts
