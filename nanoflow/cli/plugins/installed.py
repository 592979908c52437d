"""The list of installed plugins."""

from __future__ import annotations

from nanoflow.cli import show
from nanoflow.cli.hydra.config_files import ConfigFiles
from nanoflow.core.registry.component import Component
from nanoflow.core.registry.registry import Registry


def show_all(registry: Registry) -> None:
    """Print each plugin with its package and whether it can be used here; what is blocked, and what is broken."""
    rows = [
        (role, entry.component.name, entry.package, entry.version, _availability(entry.component))
        for role in registry.roles
        for entry in registry.entries(role)
    ]
    print(show.table(("role", "name", "package", "version", "here"), rows))
    if registry.blocked:
        print(f"\nBlocked: {', '.join(registry.blocked)}")
    for problem in [*registry.problems, *ConfigFiles(registry).problems]:
        show.warn(problem)


def _availability(component: Component) -> str:
    try:
        reason = component.available()
    except Exception as error:  # a third party's code must not take the list down
        reason = f"{type(error).__name__}: {error}"
    return f"no: {reason}" if reason else "yes"
