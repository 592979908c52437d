"""Hook specifications, generated from the table of roles: the functions by which plugins reach nanoflow.

A hook returns values and registers nothing by side effect. It is called once, when a `Registry` is made, and must be
cheap: no torch, no transformers at import time (import them inside `Component.build`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pluggy

from nanoflow.core.registry.component import Component
from nanoflow.core.registry.roles import Role, Roles

PROJECT = "nanoflow"
CONFIG_PACKAGES = "nanoflow_config_packages"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def hookspecs(roles: Roles) -> dict[str, Callable[[], list[Any]]]:
    """The specification of every hook by name: one a role, and `nanoflow_config_packages`."""
    return {role.hook: _of_role(role) for role in roles.values()} | {CONFIG_PACKAGES: nanoflow_config_packages}


def plugin_manager(roles: Roles) -> pluggy.PluginManager:
    """A manager that knows these hooks and no plugin yet."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(SimpleNamespace(**hookspecs(roles)))
    return manager


def _of_role(role: Role) -> Callable[[], list[Component]]:
    def hook() -> list[Component]:
        raise NotImplementedError("a specification is never called")

    hook.__name__ = hook.__qualname__ = role.hook
    hook.__doc__ = (
        f"Plugins for `{role.name}`. `Component.build(config, {role.context.__name__})` returns "
        f"what fulfils the contract `{role.product.__name__}`."
    )
    return hookspec(hook)


@hookspec
def nanoflow_config_packages() -> list[str]:
    """Packages whose folders mirror `conf/`, such as `["theirs.conf"]`; their yaml files join the config groups."""
    raise NotImplementedError("a specification is never called")
