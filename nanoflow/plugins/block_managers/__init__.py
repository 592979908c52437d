"""Built-in block managers."""

from __future__ import annotations

from nanoflow.core.registry.component import Component
from nanoflow.core.registry.hookspecs import hookimpl
from nanoflow.plugins.block_managers.plain import PlainBlockManager
from nanoflow.plugins.block_managers.prefix import PrefixBlockManager
from nanoflow.plugins.block_managers.radix import RadixBlockManager


@hookimpl
def nanoflow_block_managers() -> list[Component]:
    return [
        Component("prefix", build=PrefixBlockManager),
        Component("radix", build=RadixBlockManager),
        Component("plain", build=PlainBlockManager),
    ]
