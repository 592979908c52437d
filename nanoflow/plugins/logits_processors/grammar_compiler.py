"""From `structured_outputs` to a grammar, on threads of its own.

llguidance does the work. It compiles lazily, so that a grammar is ready in well under a millisecond; what takes long
is the first one, for which it reads the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nanoflow.core.config.errors import RequestError, one_line
from nanoflow.core.config.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow.plugins.logits_processors.grammar_state import Grammar, sentence
from nanoflow.plugins.logits_processors.schema_numbers import check_numbers

if TYPE_CHECKING:
    from nanoflow.core.text.tokenizer import Tokenizer

NUM_THREADS = 4
NUM_HEAVY_THREADS = 2
HEAVY = 16384  # characters from which on a grammar takes long, and others should not wait for it
NUM_KEPT = 128  # grammars that are kept for the next request with the same one
# Between the parts of JSON: a space, or a new line and its indentation. A weak model would go on with it for ever.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,16}"


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
        self.heavy_pool = ThreadPoolExecutor(NUM_HEAVY_THREADS, "grammar-heavy")
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
                "run: pip install 'nanoflow-engine[structured]'."
            )
        if self.tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer, and the checkpoint has none.")
        if not self.tokenizer.is_fast:
            raise RequestError("structured_outputs needs a fast tokenizer, and the checkpoint has no tokenizer.json.")
        try:
            problem = self.validate(source(params))
        except RequestError:
            raise
        except Exception as error:  # whatever the library raises
            problem = one_line(error)
        if problem:
            raise RequestError(sentence(f"structured_outputs.{params.kind} can't be used", problem))

    def submit(self, params: SamplingParams) -> Future[Grammar]:
        """The grammar of a request's `structured_outputs`, which `check` found nothing wrong with, once it is compiled.

        The future raises `RequestError` if something is wrong with it all the same.
        """
        future: Future[Grammar] = Future()
        self.pool.submit(self._begin, params, future)
        return future

    def close(self) -> None:
        """End the threads once they are done with what they are at; nothing can be compiled any more."""
        for pool in (self.pool, self.heavy_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, params: SamplingParams, future: Future[Grammar]) -> None:
        """Compile a small grammar; have a large one compiled where small ones don't wait for it."""
        with _told(future):
            assert params.structured_outputs is not None
            grammar = source(params.structured_outputs)
            if len(grammar) < HEAVY:
                self._finish(params, grammar, future)
            else:
                self.heavy_pool.submit(self._finish, params, grammar, future)

    def _finish(self, params: SamplingParams, grammar: str, future: Future[Grammar]) -> None:
        with _told(future):
            if future.set_running_or_notify_cancel():
                future.set_result(self._compiled(params, grammar))

    def _compiled(self, params: SamplingParams, grammar: str) -> Grammar:
        structured = params.structured_outputs
        assert structured is not None
        matcher = self.matcher(grammar)
        if problem := matcher.get_error():
            raise RequestError(sentence(f"structured_outputs.{structured.kind} can't be used", problem))
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


@contextmanager
def _told(future: Future[Grammar]) -> Iterator[None]:
    """Whatever goes wrong is the future's error, unless nobody waits for it any more."""
    try:
        yield
    except Exception as error:  # whatever the library raises
        told = error
        if not isinstance(error, RequestError):
            told = RequestError(f"The grammar can't be used ({one_line(error)}).")
            told.__cause__ = error
        if future.running() or future.set_running_or_notify_cancel():
            future.set_exception(told)


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
        # One terminal: the parser has a limit of alternatives, the lexer has none.
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        try:
            return grammar_from("grammar", params.grammar)
        except ValueError as error:
            raise RequestError(sentence("structured_outputs.grammar can't be used", str(error))) from None
    schema = {"type": "object"} if params.json_object else params.json
    check_numbers(schema)
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _validate(grammar: str) -> str:
    """What is wrong with a grammar, or an empty text."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if is_error else ""
