"""The hooks through which every plugin, built-in ones included, reaches nanoflow.

A hook returns values and registers nothing by side effect. It is called once, when a `Registry` is made, and must be
cheap: no torch, no transformers at import time (import them inside `Component.build`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from nanoflow.core.registry.component import Component

PROJECT = "nanoflow"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def nanoflow_models() -> list[Component]:
    """Model architectures. `Component.build(config, ModelContext)` returns a `ModelArch`."""


@hookspec
def nanoflow_attention_backends() -> list[Component]:
    """Attention backends. `Component.build(config, AttentionContext)` returns an `AttentionBackend`."""


@hookspec
def nanoflow_schedulers() -> list[Component]:
    """Schedulers. `Component.build(config, SchedulerContext)` returns a `Scheduler`."""


@hookspec
def nanoflow_block_managers() -> list[Component]:
    """Block managers. `Component.build(config, BlockManagerContext)` returns a `BlockManager`."""


@hookspec
def nanoflow_config_packages() -> list[str]:
    """Packages whose folders mirror `conf/`, such as `["theirs.conf"]`; their yaml files join the config groups."""
