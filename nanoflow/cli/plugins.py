"""`nanoflow plugins`: what is installed, where it comes from, and whether it can be used here; and a start for more."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

from nanoflow.cli import UsageError, new_plugin, show
from nanoflow.cli.config_files import ConfigFiles
from nanoflow.core.registry.component import Component
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES

USAGE = f"""\
Usage: nanoflow plugins
       nanoflow plugins new NAME --role {"|".join(ROLES)}

Lists the installed plugins: role, name, package and version, and whether each can be used on this machine.
`new` writes a package for a plugin NAME into the folder nanoflow-NAME: code, config file, tests and README."""


def main(argv: list[str]) -> int:
    """Run the command with its arguments and return the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    if argv and argv[0] == "new":
        arguments = _Parser().parse_args(argv[1:])
        folder = new_plugin.write(arguments.name, arguments.role, Path())
        print(f"Wrote {folder}. Install it, and run its tests:\n\n  cd {folder} && pip install -e '.[test]' && pytest")
        return 0
    if argv:
        raise UsageError(f"`nanoflow plugins` takes nothing, or `new NAME --role ROLE`; got {argv[0]!r}.")
    registry = Registry.load()
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
    return 0


class _Parser(ArgumentParser):
    """The arguments of `nanoflow plugins new`."""

    def __init__(self) -> None:
        super().__init__(prog="nanoflow plugins new", add_help=False, allow_abbrev=False)
        self.add_argument("name")
        self.add_argument("--role", required=True, choices=ROLES)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; write `nanoflow plugins new NAME --role {'|'.join(ROLES)}`.")


def _availability(component: Component) -> str:
    try:
        reason = component.available()
    except Exception as error:  # a third party's code must not take the list down
        reason = f"{type(error).__name__}: {error}"
    return f"no: {reason}" if reason else "yes"
