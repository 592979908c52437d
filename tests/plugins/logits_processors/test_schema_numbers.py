"""Numbers that a grammar would be held to wrongly are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nanoflow.core.config.errors import RequestError
from nanoflow.plugins.logits_processors.schema_numbers import check_numbers
from tests.core.sentences import raises_sentence

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer", "minimum": 2**53 + 1}, "bounds must lie within 2**53 (9007199254740992), got minimum="),
    ({"maximum": -(2**53) - 1}, "got maximum=-9007199254740993"),
    ({"properties": {"enum": {"minimum": 2**60}}}, "bounds must lie"),
    ({"properties": {"const": {"items": [{"maxLength": 10**30}]}}}, "got maxLength="),
    ({"$defs": {"a": {"anyOf": [{"multipleOf": 10**400}]}}}, "got multipleOf="),
    ({"const": 2**63}, "integers must have at most 64 bits, got const="),
    ({"enum": [1, {"a": [-(2**63) - 1]}]}, "integers must have at most 64 bits, got enum="),
    ({"minimum": math.inf}, "numbers must be finite, got minimum=inf"),
    ({"const": math.nan}, "numbers must be finite, got const=nan"),
]
TAKEN: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
    {"const": 2**63 - 1},
    {"enum": [-(2**63), {"minimum": 2**60}]},
    {"minimum": 1e300, "uniqueItems": True},
]


@pytest.mark.parametrize(("schema", "words"), REFUSED)
def test_refused(schema: dict[str, Any], words: str) -> None:
    for given in (schema, json.dumps(schema)):
        with raises_sentence(RequestError, "structured_outputs.json can't be used: ", words):
            check_numbers(given)


@pytest.mark.parametrize("schema", TAKEN)
def test_taken(schema: dict[str, Any]) -> None:
    check_numbers(schema)
    check_numbers(json.dumps(schema))


def test_deep_schemas() -> None:
    schema: dict[str, Any] = {"minimum": 2**60}
    for _ in range(50_000):
        schema = {"items": schema}
    with raises_sentence(RequestError, "bounds must lie"):
        check_numbers(schema)
