"""The signature that `LLM` and `AsyncLLM` show, so that editors complete their options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

from nanoflow.core.config.engine_config import EngineConfig, SchedulerConfig
from nanoflow.core.registry.roles import ROLES, in_config

Init = TypeVar("Init", bound=Callable[..., None])


def shows_options(init: Init) -> Init:
    """Lets an `__init__(self, checkpoint, **options)` show what the options may be: those of the engine and of every
    scheduler, and the roles. Those of other plugins, which nobody knows before they are loaded, stay `**options`."""
    before, rest = list(signature(init).parameters.values())[:-1], list(signature(init).parameters.values())[-1]
    init.__signature__ = Signature([*before, *_options(), rest])  # type: ignore[attr-defined]
    return init


def _options() -> Iterator[Parameter]:
    for field in (*fields(EngineConfig), *fields(SchedulerConfig)):
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=_default(field), annotation=field.type)
    for role in in_config(ROLES):
        kind = "str" if ROLES[role].cardinality == "one" else "list[Any]"
        yield Parameter(role, Parameter.KEYWORD_ONLY, default=ROLES[role].default, annotation=kind)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
