"""Numbers of a JSON schema that a grammar can't be held to, since llguidance reads bounds as float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isfinite
from typing import Any

from nanoflow.core.config.errors import RequestError, shown

MOST_EXACT = 2**53  # integers up to here differ from each other in float64
VALUES = ("const", "enum")  # what is written out as it stands, in 64 bits

NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # keys are no keywords


def check_numbers(schema: str | dict[str, Any]) -> None:
    """Refuse a schema whose output would not match it.

    Raises:
        RequestError: a number that is infinite or none, an integer in `const` or `enum` of more than 64 bits, or
            another one beyond 2**53, of which neighbours are one and the same.
    """
    for keyword, number in _numbers(json.loads(schema) if isinstance(schema, str) else schema):
        if isinstance(number, float):
            if not isfinite(number):
                raise _refusal(keyword, number, "numbers must be finite")
        elif keyword in VALUES:
            if not -(2**63) <= number < 2**63:
                raise _refusal(keyword, number, "integers must have at most 64 bits")
        elif abs(number) > MOST_EXACT:
            raise _refusal(keyword, number, "bounds must lie within 2**53 (9007199254740992)")


def _refusal(keyword: str, number: float, rule: str) -> RequestError:
    return RequestError(f"structured_outputs.json can't be used: {rule}, got {keyword}={shown(number):.80}.")


def _numbers(schema: Any) -> Iterator[tuple[str, int | float]]:
    """All numbers in a schema, each with the keyword that it belongs to; without recursion, however deep it is."""
    waiting: list[tuple[str, Any]] = [("", schema)]
    while waiting:
        keyword, value = waiting.pop()
        if isinstance(value, dict):
            of_keyword = keyword in VALUES or keyword in NAMED_SCHEMAS
            inherited = "" if keyword in NAMED_SCHEMAS else keyword
            waiting += [(inherited if of_keyword else str(key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(keyword, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield keyword, value
