"""From a name in a config to a plugin: hooks, components, and the registry that finds them."""

from nanoflow.core.registry.component import Component, NoOptions
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.core.registry.registry import Registry

__all__ = [
    "Component",
    "NoOptions",
    "Registry",
    "hookimpl",
]
