"""Values that nobody should give as an option, and some that one may: a way to draw keywords of a dataclass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch


class Unprintable:
    """An object whose methods raise."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    __hash__ = None  # type: ignore[assignment]


def nested(depth: int, *, as_list: bool = False) -> Any:
    """A dict, or a list, of that many levels."""
    value: Any = {}
    for _ in range(depth):
        value = [value] if as_list else {"properties": {"a": value}}
    return value


def random_schema_bomb(rng: random.Random) -> Any:
    """A schema that is none, or with strange numbers and texts in it."""
    number = rng.choice([10**30, 2**53 + 1, -(2**63), 2**64, 1e300, math.inf, math.nan, -1, 0.5, "1", None, True])
    keyword = rng.choice(["minimum", "maxLength", "minItems", "multipleOf", "const", "enum", "pattern", "type", "$ref"])
    value = rng.choice([number, [number], {"a": number}, "\ud800", "(", "a" * 5000, [], {}])
    kind = rng.choice(["integer", "string", "array", "number", "object", 5, None, "\ud800"])
    return rng.choice([
        {"type": kind, keyword: value}, {"properties": {rng.choice(["a", "\ud800", ""]): {keyword: value}}},
        nested(200), nested(20_000), nested(20_000, as_list=True), "{" * 100_000, "[" * 100_000 + "]" * 100_000,
        '{"minimum": 1' + "0" * 5000 + "}", '{"type": "integer", "minimum": 9007199254740993}', '{"const": "\\ud800"}',
        {"type": {1, 2}}, {1: 2}, {(1, 2): 3}, {"const": np.float32(1)}, {"const": torch.ones(2)}, dict, int,
    ])  # fmt: skip


@lru_cache
def strange_values() -> tuple[Callable[[], Any], ...]:
    """Makers of values, since some are too large to keep."""
    values: list[Any] = [
        None, True, False, 0, 1, 2, -1, 10**400, -(10**400), 10**5000, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1,
        0.0, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 1 + 2j, Decimal("0.5"), Fraction(1, 2),
        "", " ", "a", "1", "\ud800", "a\ud800b", "\0", "é" * 1000, "true", "nan", b"a", bytearray(b"a"),
        [], [1], [0, 1, 2], [None], ["a"], [""], ["\ud800"], [10**400], [math.nan], [True], [[1]], (), (1, 2), {1, 2},
        frozenset("a"), range(3), iter([1]), {}, {"a": 1}, {1: 1.0}, {"1": 1}, {1: math.nan}, {10**400: 1}, {"²": 1},
        {"9" * 5000: 1}, {None: None}, {"\ud800": {}}, {"bad_words": {}}, object(), object, len, lambda: 1, Unprintable,
        Unprintable(), [Unprintable()], {"a": Unprintable()},
        np.int64(3), np.int8(-1), np.uint64(2**64 - 1), np.float32(0.5), np.float64(math.nan), np.float16(1),
        np.bool_(True), np.str_("a"), np.bytes_(b"a"), np.array([1, 2]), np.array([0.5]), np.array([]), np.array(1),
        np.ones((2, 2)), np.array(["a"]), np.array([None]), [np.int64(1)], [np.float32(1)],
        {np.int64(1): np.float32(1)}, np.datetime64("2020"), torch.tensor(1), torch.tensor(0.5), torch.tensor([1, 2]),
        torch.ones(2, 2), torch.tensor([True]), torch.tensor([1.0], requires_grad=True), torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"), [torch.tensor(1)], torch.float16, torch.device("cpu"), list(range(10**4)),
        "x" * 10**5,
    ]  # fmt: skip
    makers = [lambda value=value: value for value in values]
    return (*makers, lambda: nested(20_000), lambda: nested(20_000, as_list=True))


def draw(rng: random.Random, config: type, good: dict[str, list[Any]]) -> dict[str, Any]:
    """Keywords for a dataclass: one to four of its fields, each strange with an even chance, else one of the `good`."""
    chosen = rng.sample(fields(config), min(len(fields(config)), rng.randint(1, 4)))
    result = {}
    for field in chosen:
        known = good.get(field.name)
        result[field.name] = rng.choice(known) if known and rng.random() < 0.5 else rng.choice(strange_values())()
    return result
