"""How a plugin describes itself to the registry."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.core.config.errors import NanoflowError, PluginError
from nanoflow.core.registry.roles import Role


@dataclass(frozen=True)
class NoOptions:
    """The config of a plugin that has no options."""


@dataclass(frozen=True)
class Component:
    """A plugin's description of itself, returned by the hook of its role. Making one must be cheap.

    Attributes:
        name: how configs name it (`attention=NAME`); unique in its role.
        build: `(config, context) -> object`, with an instance of `config` and the role's context. Heavy imports belong
            in here. May raise `ConfigError` or `PluginError`.
        config: dataclass of its options with their defaults; `option` adds the help line. A scheduler's derives from
            `SchedulerConfig`.
        available: None if it can be used on this machine, else one sentence that says why not and what would help
            ("the package flash-attn is not installed: pip install flash-attn"). Called for `nanoflow plugins` too.
        supports: None if it can serve this context, else the reason. Asked after `available`.
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

    def why_not(self, config: Any, context: Any) -> str | None:
        """Why it can't be used here, or can't serve this context if there is one; None if it can."""
        return self.available() or (self.supports(config, context) if context is not None else None)


@dataclass(frozen=True)
class Entry:
    """An installed component.

    Attributes:
        role: what it can serve as.
        component: the plugin's description of itself.
        package, version: of the distribution that brought it.
    """

    role: Role
    component: Component
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.role.name}={self.component.name} from {self.package} {self.version}"

    def build(self, config: Any, context: Any) -> Any:
        """The object that serves the role.

        Raises:
            NanoflowError: the plugin's own.
            PluginError: the plugin fails, or makes something else; the message names it, and where it failed.
        """
        try:
            built = self.component.build(config, context)
        except NanoflowError:
            raise
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).parent.name}/{Path(place.filename).name}:{place.lineno}"
            raise PluginError(
                f"{self} could not be built: {reason_of(error)} (at {where}); --debug shows the traceback."
            ) from error
        product = self.role.product
        if not isinstance(built, product):
            raise PluginError(
                f"{self} built a {type(built).__name__}, which is no {product.__name__}; "
                f"what serves the role {self.role.name} must derive from that."
            )
        return built


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, after its class where it is not meant for the user."""
    text = str(error).splitlines()[0] if str(error) else "no message"
    return text if isinstance(error, NanoflowError) else f"{type(error).__name__}: {text}"
