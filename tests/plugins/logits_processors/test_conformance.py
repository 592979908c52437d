"""The built-in logits processors keep to the contract."""

from __future__ import annotations

from typing import Any

from nanoflow.testing import LogitsProcessorSuite

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string"}}}


class TestBiasAndPenalties(LogitsProcessorSuite):
    component = "bias_and_penalties"
    vocab_size = 200
    requests: dict[str, dict[str, Any]] = {
        "repetition": {"repetition_penalty": 1.7},
        "presence": {"presence_penalty": 1.5},
        "frequency": {"frequency_penalty": 0.8, "temperature": 1.0, "seed": 5},
        "all": {"repetition_penalty": 0.7, "presence_penalty": -1, "frequency_penalty": 1, "logit_bias": {3: 4.0}},
        "bias": {"logit_bias": {7: 3.0, 8: 3.0, 9: -100.0}},
        "allowed": {"allowed_token_ids": list(range(20, 40))},
        "words": {"bad_words": ["!", "#", "+", "a"]},
    }
    refused = {
        "unknown id": {"logit_bias": {10**6: 1.0}},
        "huge id": {"allowed_token_ids": [2**70]},
        "nothing left": {"allowed_token_ids": [1], "bad_words": ["!"]},
        "stop tokens alone": {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2},
    }


class TestMinTokens(LogitsProcessorSuite):
    component = "min_tokens"
    vocab_size = 30
    requests: dict[str, dict[str, Any]] = {
        "some": {"min_tokens": 9}, "one": {"min_tokens": 1, "stop_token_ids": list(range(10))},
        "many": {"min_tokens": 22, "stop_token_ids": [4, 5]}, "no end": {"min_tokens": 5, "ignore_eos": True,
        "stop_token_ids": [3, 9]},
    }  # fmt: skip


class TestBadWords(LogitsProcessorSuite):
    component = "bad_words"
    vocab_size = 8
    requests: dict[str, dict[str, Any]] = {
        "pairs": {"bad_words": ['!"', "#$", "$$", "%&"]},
        "longer": {"bad_words": ["!!", '""', '#"#', "&%$#"]},
        "one": {"bad_words": ["#%", "#&", '#"', "#!"], "ignore_eos": True},
    }
    refused = {"surrogate": {"bad_words": ["\ud800"]}}


class TestGrammar(LogitsProcessorSuite):
    component = "grammar"
    requests: dict[str, dict[str, Any]] = {
        "schema": {"structured_outputs": {"json": SCHEMA}},
        "regex": {"structured_outputs": {"regex": "[a-f]{3,30}"}, "min_tokens": 4},
        "choice": {"structured_outputs": {"choice": ["to be", "to be or not to be"]}},
        "logprobs": {"structured_outputs": {"regex": "one two three [a-z]+"}, "logprobs": 1},
    }
    refused = {"schema": {"structured_outputs": {"json": {"type": "foo"}}}}
