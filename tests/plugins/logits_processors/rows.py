"""Logits processors by themselves, without an engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanoflow import SamplingParams
from nanoflow.core.contracts.logits_processor import LogitsProcessor, LogitsProcessorContext
from nanoflow.core.data.sequence import Sequence
from nanoflow.core.registry.registry import Registry


class Numerals:
    """In place of a tokenizer: a word is token ids with blanks between them."""

    eos_token_id = None
    is_fast = False

    def word_token_ids(self, words: Iterable[str]) -> list[list[int]]:
        return [[int(numeral) for numeral in word.split()] for word in words]


def as_words(words: Iterable[list[int]]) -> list[str]:
    """What `Numerals` reads as these token ids."""
    return [" ".join(map(str, word)) for word in words]


def built_ins(num_slots: int, vocab_size: int, tokenizer: Any = None) -> dict[str, LogitsProcessor]:
    """All built-in logits processors by name, in the order in which they apply."""
    context = LogitsProcessorContext(
        vocab_size, num_slots, torch.device("cpu"), tokenizer or Numerals(), frozenset(), 1000
    )
    return dict(Registry.load(extra=[]).build_by_request("logits_processors", context))


def sequence_of(prompt: list[int], output: list[int], bad_words: Any = (), **params: Any) -> Sequence:
    sequence = Sequence(
        "0", prompt, SamplingParams(max_tokens=None, bad_words=as_words(bad_words) or None, **params), max_tokens=100,
        stop_token_ids=frozenset(params.get("stop_token_ids", ())),
    )  # fmt: skip
    sequence.token_ids += output
    return sequence


def use_numerals(engine: Any) -> None:
    """Let an engine without a tokenizer read bad words as numerals."""
    for name in ("bias_and_penalties", "bad_words"):
        processor = engine.processors.by_name[name]
        processor.tokenizer = Numerals()
        processor.word_token_ids.tokenizer = Numerals()
