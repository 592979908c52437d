"""How a plugin describes itself to the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class NoOptions:
    """The config of a plugin that has no options."""


@dataclass(frozen=True)
class Component:
    """A plugin's description of itself, returned by one of the hooks in `hookspecs.py`. Making one must be cheap.

    Attributes:
        name: how configs name it (`attention=NAME`); unique in its role.
        build: `(config, context) -> object`, with an instance of `config` and the role's context (below). Heavy imports
            belong in here. May raise `ConfigError` or `PluginError`.
        config: dataclass of its options with their defaults; `core.config.option` adds the help line. A scheduler's
            derives from `core.config.SchedulerConfig`.
        available: None if it can be used on this machine, else one sentence that says why not and what would help
            ("the package flash-attn is not installed: pip install flash-attn"). Called for `nanoflow plugins` too.
        supports: attention backends only: None if it can serve this context, else the reason. Asked after `available`.
        priority: `auto` takes the highest that can serve; a negative one is never taken by `auto`.
        architectures: models only: the Hugging Face `architectures` that it serves.
        positions_key: models only: what config.json calls the most tokens in a sequence.
    """

    name: str
    build: Callable[[Any, Any], Any]
    config: type = NoOptions
    available: Callable[[], str | None] = lambda: None
    supports: Callable[[Any, Any], str | None] = lambda config, context: None
    priority: int = 0
    architectures: tuple[str, ...] = ()
    positions_key: str = "max_position_embeddings"
