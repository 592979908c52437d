"""Libraries for structured output: time to compile a grammar, time of a mask, and what of JSON Schema they know.

    python benchmarks/structured.py

Both libraries are asked if they are installed: llguidance, which nanoflow uses, and xgrammar. The outputs are random
walks through the grammar with the bundled tokenizer.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import nanoflow
from nanoflow.core.text.load_tokenizer import load_tokenizer
from nanoflow.core.text.tokenizer import Tokenizer

MAX_TOKENS = 200
WALKS = 5
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string",
            "pattern": "^[0-9]{5}$"}}, "required": ["street", "zip"], "additionalProperties": False},
    },
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "person": PERSON,
    "list of persons": {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 8},
    "tree": {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value", "children"], "additionalProperties": False}}},
    "1000 names": {"enum": [f"name {i * 7919 % 10007}" for i in range(1000)]},
    "200 fields": {"type": "object", "properties": {f"field_{i}": {"type": "integer"} for i in range(200)},
        "required": [f"field_{i}" for i in range(0, 200, 2)], "additionalProperties": False},
}  # fmt: skip
FEATURES: dict[str, tuple[dict[str, Any], str, str]] = {  # a schema, what matches it, and what does not
    "minimum": ({"type": "integer", "minimum": 3}, "3", "2"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "10", "11"),
    "maxLength": ({"type": "string", "maxLength": 2}, '"ab"', '"abc"'),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"aa"', '"ab"'),
    "format": ({"type": "string", "format": "date"}, '"2024-05-06"', '"yesterday"'),
    "minItems": ({"type": "array", "minItems": 1}, "[1]", "[]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, "[1]", '["a"]'),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "[1,2]", "[1,1]"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[1]", "[2]"),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a":1}', '{"a":"b"}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^a": {"type": "integer"}},
                           "additionalProperties": False}, '{"ab":1}', '{"b":1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", "true"),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, "3", "5"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "null", "true"),
    "not": ({"type": "integer", "not": {"const": 1}}, "2", "1"),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 7}}, "6", "8"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a":1,"b":1}', '{"a":1}'),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "null", "1"),
}  # fmt: skip


class LLGuidance:
    """What nanoflow does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance.hf import from_tokenizer

        self.tokenizer = from_tokenizer(tokenizer.hf)

    def compile(self, schema: dict[str, Any]) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any) -> np.ndarray:
        return np.frombuffer(matcher.compute_bitmask(), np.uint8)

    def accept(self, matcher: Any, token_id: int) -> bool:
        return matcher.consume_token(token_id)

    def is_complete(self, matcher: Any) -> bool:
        return matcher.is_accepting()


class XGrammar:
    """Set up the same way: any white space, additional properties as the schema says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar

        self.info = xgrammar.TokenizerInfo.from_huggingface(tokenizer.hf)
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.bitmask = xgrammar.allocate_token_bitmask(1, self.info.vocab_size)

    def compile(self, schema: dict[str, Any]) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def matcher(self, compiled: Any) -> Any:
        import xgrammar

        return xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False)

    def mask(self, matcher: Any) -> np.ndarray:
        self.bitmask.fill_(-1)
        matcher.fill_next_token_bitmask(self.bitmask)
        return self.bitmask.numpy()[0].view(np.uint8)

    def accept(self, matcher: Any, token_id: int) -> bool:
        return matcher.accept_token(token_id)

    def is_complete(self, matcher: Any) -> bool:
        return self.accept(matcher, 0)  # end of sequence


def walk(library: Any, matcher: Any, seed: int) -> Iterator[float]:
    """Seconds of each mask on a random way through a grammar."""
    rng = random.Random(seed)
    for _ in range(MAX_TOKENS):
        start = time.perf_counter()
        mask = library.mask(matcher)
        yield time.perf_counter() - start
        allowed = [i for i in np.flatnonzero(np.unpackbits(mask, bitorder="little")[:2048]).tolist() if i]
        if not allowed or not library.accept(matcher, rng.choice(allowed)):
            return


def knows(library: Any, tokenizer: Tokenizer, feature: str) -> str:
    """`yes`, `refused` when it is compiled, or `ignored`, where outputs may not match."""
    schema, right, wrong = FEATURES[feature]
    try:
        compiled = library.compile(schema)
    except Exception:  # whatever each library has for it
        return "refused"

    def takes(text: str) -> bool:
        matcher = library.matcher(compiled)
        return all(library.accept(matcher, i) for i in tokenizer.encode(text)) and library.is_complete(matcher)

    return "yes" if takes(right) and not takes(wrong) else "ignored" if takes(wrong) else "too strict"


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    tokenizer = load_tokenizer(Path(nanoflow.__file__).parent / "assets" / "bard")
    assert tokenizer is not None
    libraries = {name: cls for name, cls in (("llguidance", LLGuidance), ("xgrammar", XGrammar)) if find_spec(name)}
    made = {}
    for name, cls in libraries.items():
        seconds, made[name] = timed(cls, tokenizer)
        print(f"{name}: tokenizer read in {seconds * 1e3:.1f} ms")
    print(f"\n{'schema':<20}{'library':<12}{'compile ms':>11}{'copy us':>9}{'mask us: median':>17}{'p99':>8}{'max':>9}")
    for title, schema in SCHEMAS.items():
        for name, library in made.items():
            compile_s = statistics.median(timed(library.compile, schema)[0] for _ in range(5))
            compiled = library.compile(schema)
            copy_s = statistics.median(timed(library.matcher, compiled)[0] for _ in range(20))
            masks = [s for seed in range(WALKS) for s in walk(library, library.matcher(compiled), seed)]
            p99 = np.percentile(masks, 99)
            print(f"{title:<20}{name:<12}{compile_s * 1e3:>11.2f}{copy_s * 1e6:>9.1f}"
                  f"{statistics.median(masks) * 1e6:>17.1f}{p99 * 1e6:>8.1f}{max(masks) * 1e6:>9.1f}")  # fmt: skip
    print("\n" + f"{'keyword':<22}" + "".join(f"{name:<12}" for name in made))
    for feature in FEATURES:
        print(f"{feature:<22}" + "".join(f"{knows(library, tokenizer, feature):<12}" for library in made.values()))


if __name__ == "__main__":
    main()
