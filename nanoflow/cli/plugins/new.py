"""Writes a package for a new plugin, from the files in `nanoflow/templates`."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.plugins import skeleton
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.version import __version__
from nanoflow.core.registry.contract import CONTRACT
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import Role

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
CONFIG_HOOK = """

@hookimpl
def nanoflow_config_packages() -> list[str]:
    return ["{module}.conf"]
"""
PRESET = (
    " What differs from the defaults of its options is in `{folder}/{name}.yaml`; each further file there is a preset."
)
ENDING = ".tmpl"  # of templates, so that nothing takes them for code


def write(name: str, role: str, parent: Path) -> Path:
    """Write a package with a plugin `name` for `role` into a new folder under `parent`, and return the folder.

    Raises:
        ConfigError: the name can't be a plugin's, or is taken, or the folder exists or can't be made.
    """
    registry = Registry.load()
    module = "nanoflow_" + name.replace("-", "_")
    if not NAME.fullmatch(name) or name == AUTO:
        raise ConfigError(
            f"{name!r} can't be the name of a plugin; write small letters, digits and dashes, such as 'my-{role}'."
        )
    if taken := next((entry for entry in registry.entries(role) if entry.component.name == name), None):
        raise ConfigError(f"There is a {taken} already; take another name.")
    folder = parent / f"nanoflow-{name}"
    if folder.exists():
        raise ConfigError(f"{folder} exists already; take another name, or remove it.")
    values = _values(name, module, registry.roles[role])
    templates = files("nanoflow") / "templates"
    own = templates / role
    presets = ["preset"] if registry.roles[role].cardinality == "one" else []
    try:
        for source in ("package", *presets, role if own.is_dir() else "any"):
            _copy(templates / source, folder, values)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}.") from error
    return folder


def _values(name: str, module: str, role: Role) -> dict[str, str]:
    """What templates are filled with."""
    choices = {
        "one": f"{role.name}={name}",
        "several": f"'{role.name}=[{name}]'",
        "by_request": f"'sampling.{role.name}={{{name}: {{}}}}'",
    }
    one, product, context = role.cardinality == "one", role.product.__name__, role.context.__name__
    return {
        "name": name, "role": role.name, "module": module, "version": __version__, "contract": str(CONTRACT.version),
        "Class": "".join(part.capitalize() for part in re.split("[_-]", name)), "hook": role.hook,
        "product": product, "context": context, "choice": choices[role.cardinality],
        "described": skeleton.in_order({product, context, "Component", "NoOptions", "hookimpl"}),
        "methods": skeleton.methods(role.product), "imports": skeleton.imports(role),
        "config_hook": CONFIG_HOOK.format(module=module) if one else "",
        "preset": PRESET.format(folder=f"{module}/conf/{role.name}", name=name) if one else "",
    }  # fmt: skip


def _copy(source: Traversable, folder: Path, values: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        target = folder / _filled(item.name.removesuffix(ENDING), values)
        if item.is_dir():
            _copy(item, target, values)
        else:
            target.write_text(_filled(item.read_text(encoding="utf-8"), values).rstrip() + "\n", encoding="utf-8")


def _filled(text: str, values: dict[str, str]) -> str:
    """`text` with each `@key@` replaced by its value."""
    return re.sub(r"@(\w+?)@", lambda match: values[match[1]], text)
