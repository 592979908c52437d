"""The yaml files of `conf/`: the shipped ones, and those of plugin packages whose folders mirror it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.core.registry.registry import AUTO, Registry

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIX = ".yaml"


def conf_folder() -> Traversable:
    """The shipped `conf/`: inside the package in a wheel, beside it in a source tree."""
    inside = files("nanoflow") / "conf"
    return inside if inside.is_dir() else Path(str(files("nanoflow"))).parent / "conf"


class ConfigFiles:
    """All files, none of which shadows another one or a plugin.

    Attributes:
        files: by their place without suffix, such as `scheduler/fcfs`.
        problems: one sentence for each file that was left out.
    """

    def __init__(self, registry: Registry) -> None:
        self.files: dict[str, Traversable] = dict(_walk(conf_folder()))
        self.problems: list[str] = []
        owners = dict.fromkeys(self.files, "nanoflow")
        for package, distribution in registry.config_packages.items():
            for place, file in _walk(files(package)):
                if (refused := _refused(place, package, registry)) is not None:
                    self.problems.append(refused)
                elif (owner := owners.get(place) or _plugin_of(place, registry, distribution)) is not None:
                    self.problems.append(
                        f"The config file {place}{SUFFIX} of {package} was left out: {place.replace('/', '=')} is "
                        f"{owner}'s already; rename the file."
                    )
                else:
                    self.files[place] = file
                    owners[place] = distribution


def _walk(folder: Traversable, place: str = "") -> Iterator[tuple[str, Traversable]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _walk(item, f"{place}{item.name}/")
        elif item.name.endswith(SUFFIX):
            yield place + item.name.removesuffix(SUFFIX), item


def _refused(place: str, package: str, registry: Registry) -> str | None:
    """Why a file in the folder of a role can't be chosen: only where one plugin serves it, a file can stand for it."""
    role = registry.roles.get(place.partition("/")[0])
    if role is None or role.cardinality == "one" or "/" not in place:
        return None
    return (
        f"The config file {place}{SUFFIX} of {package} was left out: {role.name} are chosen by their names, with "
        "options beside these, and not by files."
    )


def _plugin_of(place: str, registry: Registry, package: str) -> str | None:
    """The package, if not this one, whose plugin is chosen by the name of the file."""
    role, _, name = place.partition("/")
    if role not in registry.roles:
        return None
    if name == AUTO:
        return "nanoflow"
    owners = {entry.component.name: entry.package for entry in registry.entries(role)}
    return owners[name] if owners.get(name, package) != package else None
