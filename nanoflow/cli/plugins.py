"""`nanoflow plugins`: what is installed, where it comes from, and whether it can be used here."""

from __future__ import annotations

from nanoflow.cli import UsageError, show
from nanoflow.core.config import ROLES
from nanoflow.core.interfaces import Component
from nanoflow.core.registry import Registry

USAGE = """\
Usage: nanoflow plugins

Lists the installed plugins: role, name, package and version, and whether each can be used on this machine."""


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    if argv:
        raise UsageError(f"`nanoflow plugins` takes no arguments, got {argv[0]!r}.")
    registry = Registry.load()
    rows = [
        (role, entry.component.name, entry.package, entry.version, _availability(entry.component))
        for role in ROLES
        for entry in registry.entries(role)
    ]
    print(show.table(("role", "name", "package", "version", "here"), rows))
    for problem in registry.problems:
        show.warn(problem)
    return 0


def _availability(component: Component) -> str:
    try:
        reason = component.available()
    except Exception as error:  # a third party's code must not take the list down
        reason = f"{type(error).__name__}: {error}"
    return f"no: {reason}" if reason else "yes"
