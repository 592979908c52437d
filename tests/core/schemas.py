"""Random JSON schemas, and a validator for what they use."""

from __future__ import annotations

import random
import re
from typing import Any

STRINGS = ["red", "a b", 'quo"te', "back\\slash", "né", "日本", "🎭", "tab\t", ""]
PATTERNS = ["[a-z]{1,6}", "[A-Z][a-z]+( [A-Z][a-z]+)?!", "[0-9]{3}-[0-9]{2}", "(yes|no|né|日本)"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that bounds the length of what matches it, white space and digits apart."""
    kinds = ["string", "pattern", "integer", "range", "number", "boolean", "null", "enum", "const", "nullable"]
    kind = rng.choice([*kinds, *(["object", "array", "any"] * 6 if depth else [])])
    if kind == "object":
        names = rng.sample(["id", "name", "a b", 'k"q', "né", "x", "nested_value"], rng.randint(0, 4))
        return {
            "type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6], "additionalProperties": False,
        }  # fmt: skip
    if kind == "array":
        least = rng.randint(0, 2)
        most = least + rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least, "maxItems": most}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    low = rng.randint(-50, 50)
    return {
        "string": {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
        "pattern": {"type": "string", "pattern": f"^{rng.choice(PATTERNS)}$"},
        "integer": {"type": "integer"},
        "range": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
        "number": {"type": "number"},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample([*STRINGS, 1, None, True, 2.5, [1, "a"], {"a": None}], rng.randint(1, 5))},
        "const": {"const": rng.choice(STRINGS)},
        "nullable": {"type": ["integer", "null"]},
    }[kind]


def matches(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is valid for a schema of the kind above."""
    if "anyOf" in schema:
        return any(matches(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return any(_is_of(kind, schema, value) for kind in kinds)


def _is_of(kind: str, schema: dict[str, Any], value: Any) -> bool:
    if kind == "object":
        parts = schema["properties"]
        return (
            isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(parts)
            and all(matches(parts[name], part) for name, part in value.items())
        )  # fmt: skip
    if kind == "array":
        return (
            isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(matches(schema["items"], item) for item in value)
        )  # fmt: skip
    if kind == "string":
        is_long_enough = isinstance(value, str) and schema.get("minLength", 0) <= len(value)
        fits = is_long_enough and len(value) <= schema.get("maxLength", len(value))
        return fits and re.search(schema.get("pattern", ""), value) is not None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    in_range = schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return in_range and (kind == "number" or isinstance(value, int))
