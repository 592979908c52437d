"""Structured output: which token ids may come next, so that the whole output matches a schema, a regex or a grammar.

llguidance does the work. It compiles lazily, so that a grammar is ready in well under a millisecond; what takes long
is the first one, for which it reads the tokenizer. So all of that happens on threads of its own.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanoflow.core.config.errors import RequestError
from nanoflow.core.config.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow.core.data.transfer import to_device

if TYPE_CHECKING:
    from nanoflow.core.text.tokenizer import Tokenizer

NUM_THREADS = 4
NUM_KEPT = 128  # grammars that are kept for the next request with the same one
# Between the parts of JSON: a space, or a new line and its indentation. A weak model would go on with it for ever.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,16}"


class Grammar:
    """How far one output got in its grammar, and what may follow.

    Args:
        matcher: an `LLMatcher` at its start.
        vocab_size: V, the model's; no id past it is ever allowed.
        unwanted: ids to leave out wherever there are others: end-of-sequence, if it is to be ignored.
        unwanted_early: ids to leave out as well before `min_tokens`: those that would end the request.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, unwanted: frozenset[int] = frozenset(),
        unwanted_early: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)
        self.unwanted = unwanted
        self.unwanted_early = unwanted | unwanted_early

    def accept(self, token_id: int) -> bool:
        """Take the next token of the output; False if it can't be, and `error` says why."""
        # A matcher that gave up, while it computed a mask perhaps, allows end-of-sequence alone, and takes it.
        return self.matcher.consume_token(token_id) and not self.matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """Whether the output matches and nothing but its end may follow."""
        return self.matcher.is_stopped()

    def forced(self) -> list[int]:
        """Ids that the output goes on with in any case, as the tokenizer would write them; often none."""
        return list(takewhile(lambda token_id: token_id < self.vocab_size, self.matcher.compute_ff_tokens()))

    @property
    def error(self) -> str:
        """A sentence about what went wrong, empty if nothing did; after that `accept` takes nothing more."""
        return _sentence("The output can't be held to structured_outputs", self.matcher.get_error())

    def mask(self, *, is_early: bool = False) -> np.ndarray:
        """Which ids may come next, at least one: int32 [num_words], in which id i is bit i % 32 of word i // 32.

        Args:
            is_early: the output has fewer than `min_tokens`.
        """
        words = np.frombuffer(self.matcher.compute_bitmask(), np.int32)
        words = words[: self.num_words]
        result = np.zeros(self.num_words, np.int32)
        result[: len(words)] = words
        result.view(np.uint32)[-1] &= np.uint32(0xFFFFFFFF >> (-self.vocab_size % 32))
        if unwanted := self.unwanted_early if is_early else self.unwanted:
            wanted = result.view(np.uint32).copy()
            for token_id in unwanted:
                wanted[token_id // 32] &= np.uint32(0xFFFFFFFF - (1 << token_id % 32))
            if wanted.any():
                return wanted.view(np.int32)
        return result


class GrammarCompiler:
    """Makes grammars for one tokenizer, on threads of its own.

    Args:
        tokenizer: None refuses every request.
        vocab_size: V, the model's, which may be larger than the tokenizer's.
        eos_token_ids: ids that may follow where the output may end.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.pool = ThreadPoolExecutor(NUM_THREADS, "grammar")  # starts threads when there is work
        self.validate = lru_cache(NUM_KEPT)(_validate)
        self.vocabulary = lru_cache(1)(self._vocabulary)
        self.matcher = lru_cache(NUM_KEPT)(self._matcher)

    def check(self, params: StructuredOutputsParams) -> None:
        """See whether there can be a grammar; that costs less than a step.

        Raises:
            RequestError: there can't; the message says what is wrong with it.
        """
        if find_spec("llguidance") is None:
            raise RequestError(
                "structured_outputs needs the package llguidance, which is not installed; "
                "run: pip install 'nanoflow[structured]'."
            )
        if self.tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer, and the checkpoint has none.")
        if not self.tokenizer.is_fast:
            raise RequestError("structured_outputs needs a fast tokenizer, and the checkpoint has no tokenizer.json.")
        if problem := self.validate(source(params)):
            raise RequestError(_sentence(f"structured_outputs.{params.kind} can't be used", problem))

    def submit(self, params: SamplingParams) -> Future[Grammar]:
        """The grammar of a request's `structured_outputs`, which `check` found nothing wrong with, once it is compiled.

        The future raises `RequestError` if something is wrong with it all the same.
        """
        return self.pool.submit(self._compile, params)

    def _compile(self, params: SamplingParams) -> Grammar:
        structured = params.structured_outputs
        assert structured is not None
        matcher = self.matcher(source(structured))
        if problem := matcher.get_error():
            raise RequestError(_sentence(f"structured_outputs.{structured.kind} can't be used", problem))
        return Grammar(
            matcher.deep_copy(),
            self.vocab_size,
            unwanted=self.eos_token_ids if params.ignore_eos else frozenset(),
            unwanted_early=self.eos_token_ids.union(params.stop_token_ids or ()),
        )

    def _matcher(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self.vocabulary(), grammar, log_level=0)

    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer
        from llguidance.hf import from_tokenizer

        assert self.tokenizer is not None
        hf, eos = self.tokenizer.hf, sorted(self.eos_token_ids) or None
        if max(hf.get_vocab().values(), default=0) < self.vocab_size:
            return from_tokenizer(hf, eos_token=eos)
        return LLTokenizer(without_ids_from(self.vocab_size, hf.backend_tokenizer.to_str()), eos_token=eos)


def without_ids_from(vocab_size: int, tokenizer: str) -> str:
    """A tokenizer.json without tokens that the model has no logits for, which it would else write texts with."""
    parts = json.loads(tokenizer) | {"padding": None, "truncation": None}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < vocab_size]
    model, vocab = parts["model"], parts["model"]["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = vocab[:vocab_size]
    else:
        known = model["vocab"] = {text: token_id for text, token_id in vocab.items() if token_id < vocab_size}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
            model["merges"] = [
                [left, right] for left, right in pairs
                if left in known and right in known and left + right.removeprefix(prefix) in known
            ]  # fmt: skip
    return json.dumps(parts)


def source(params: StructuredOutputsParams) -> str:
    """The grammar as llguidance takes it, not yet checked.

    Raises:
        RequestError: a grammar in GBNF that can't be read.
    """
    from llguidance import LLMatcher, grammar_from

    if params.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        try:
            return grammar_from("grammar", params.grammar)
        except ValueError as error:
            raise RequestError(_sentence("structured_outputs.grammar can't be used", str(error))) from None
    schema = {"type": "object"} if params.json_object else params.json
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


@dataclass(slots=True)
class TokenMasks:
    """What G rows of a batch may sample; the other rows may sample anything.

    Attributes:
        rows: indices of these rows in the batch's logits, rising.
        words: for each of them what `Grammar.mask` gives.
    """

    rows: list[int]
    words: list[np.ndarray]

    def apply(self, logits_SV: torch.Tensor) -> None:
        """Set to -inf what may not be sampled. One copy to the logits' device, without waiting for it."""
        table = np.empty((len(self.rows), 1 + len(self.words[0])), np.int32)
        table[:, 0] = self.rows
        table[:, 1:] = self.words
        on_device = to_device(table, logits_SV.device)
        forbid(logits_SV, on_device[:, 0], on_device[:, 1:])


def forbid(logits_SV: torch.Tensor, rows_G: torch.Tensor, words_GW: torch.Tensor) -> None:
    """Set the logits of ids whose bit is 0 to -inf, in place.

    Args:
        logits_SV: any float dtype.
        rows_G: int32; distinct rows of the logits.
        words_GW: int32, W = ceil(V / 32); bit i % 32 of word i // 32 is that of id i.
    """
    bytes_GB = words_GW.view(torch.uint8)  # low byte first, on all that torch runs on
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_SV.device)
    forbidden_GV = ((bytes_GB.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits_SV.shape[1]] == 0
    rows_G = rows_G.long()
    logits_SV[rows_G] = logits_SV[rows_G].masked_fill_(forbidden_GV, -torch.inf)


def _validate(grammar: str) -> str:
    """What is wrong with a grammar, or an empty text."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if is_error else ""


def _sentence(start: str, problem: str) -> str:
    """One sentence from the library's message, whose further lines show the place or its state."""
    if not problem:
        return ""
    lines = [line.strip() for line in problem.splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return f"{start}: {reason.rstrip('.')}."
