"""From a name in a config to a plugin: the table of roles, hooks, components, and the registry that finds them."""

from nanoflow.core.registry.by_request import ByRequest
from nanoflow.core.registry.component import Component, Entry, NoOptions
from nanoflow.core.registry.contract import CONTRACT
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES, Role

__all__ = [
    "CONTRACT",
    "ROLES",
    "ByRequest",
    "Component",
    "Entry",
    "NoOptions",
    "Registry",
    "Role",
    "hookimpl",
]
