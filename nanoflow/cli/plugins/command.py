"""The command `nanoflow plugins`: what is installed, where it comes from, and whether it can be used here."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

from nanoflow.cli.errors import UsageError
from nanoflow.cli.plugins import installed, new
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
        folder = new.write(arguments.name, arguments.role, Path())
        print(f"Wrote {folder}. Install it, and run its tests:\n\n  cd {folder} && pip install -e '.[test]' && pytest")
        return 0
    if argv:
        raise UsageError(f"`nanoflow plugins` takes nothing, or `new NAME --role ROLE`; got {argv[0]!r}.")
    installed.show_all(Registry.load())
    return 0


class _Parser(ArgumentParser):
    """The arguments of `nanoflow plugins new`."""

    def __init__(self) -> None:
        super().__init__(prog="nanoflow plugins new", add_help=False, allow_abbrev=False)
        self.add_argument("name")
        self.add_argument("--role", required=True, choices=ROLES)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; write `nanoflow plugins new NAME --role {'|'.join(ROLES)}`.")
