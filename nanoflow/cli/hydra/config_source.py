"""Where Hydra finds `conf/`: the shipped one, its third-party mirrors, and the defaults of every plugin.

Hydra reads yaml files; the defaults of nanoflow stand in dataclasses. `NanoflowSource` brings the two together: a file
holds only what is deliberately different, and what Hydra gets is that on top of the defaults. So each key exists and
can be overridden, also those of a third-party plugin whose file says no more than `name: theirs`, or that has none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanoflow.cli.hydra import user_folders
from nanoflow.cli.hydra.config_files import SUFFIX, ConfigFiles
from nanoflow.cli.settings.commands import PRIMARIES
from nanoflow.cli.settings.schema import Settings, ordered_names, sections
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import Roles, in_config

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

T = TypeVar("T", bound=Settings)


def register() -> None:
    """Make Hydra look here. Doing it again changes nothing."""
    Plugins.instance().register(NanoflowSource)
    Plugins.instance().register(NanoflowSearchPath)


class NanoflowSearchPath(SearchPathPlugin):
    """Puts `NanoflowSource` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folders = user_folders.named(sys.argv[1:])
        search_path.append("nanoflow", f"nanoflow://{json.dumps(folders) if folders else ''}")


class NanoflowSource(ConfigSource):
    """Yaml files over the defaults of the dataclasses.

    In the group of a role every name is a config. One that is no file and no plugin is refused when the registry
    is asked for it, so that in a sweep only the job that names it fails. Hydra would never look for such a name in the
    folders that the user has named, which come after this source: so it is done here, before all else.

    Args:
        provider: who put it on Hydra's search path.
        path: `nanoflow://`, and the user's folders as a JSON list if there are some.
    """

    def __init__(self, provider: str = "nanoflow", path: str = "nanoflow://") -> None:
        super().__init__(provider, path)
        self.registry = Registry.load()
        self.files = ConfigFiles(self.registry).files
        self.users = user_folders.sources(self.path)

    @staticmethod
    def scheme() -> str:
        return "nanoflow"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return any(place.startswith(f"{config_path}/") for place in self.files)

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path) is not None or self._role_and_name(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        prefix = f"{config_path}/" if config_path else ""
        inside = {place.removeprefix(prefix).split("/")[0] for place in self.files if place.startswith(prefix)}
        names: list[str] = []
        for name in inside:
            for item in (name, name + SUFFIX):  # a group, a config, or both
                self._list_add_result(names, prefix + item, item, results_filter)
        if config_path in in_config(self.registry.roles, "one") and results_filter != ObjectType.GROUP:
            names += [entry.component.name for entry in self.registry.entries(config_path)]
        return sorted(set(names))

    def load_config(self, config_path: str) -> ConfigResult:
        """The file at `config_path`, if there is one, over the defaults of the dataclass that it configures."""
        config_path = config_path.removesuffix(".yaml")
        if (source := self._users_source(config_path)) is not None:
            return self._users_preset(source, config_path)
        file = self._file(config_path)
        text = file.read_text(encoding="utf-8") if file else ""
        values = _parse(text, file)
        if choice := self._role_and_name(config_path):
            values = self._over_plugin_defaults(values, *choice)
        elif config_path in PRIMARIES:
            values = _over_defaults(values, PRIMARIES[config_path][1], self.registry.roles)
        return ConfigResult(self.provider, str(file), values, self._get_header_dict(text))

    def _users_source(self, config_path: str) -> ConfigSource | None:
        """The folder of the user's that has this preset of a role."""
        if self._role_and_name(config_path) is None:
            return None
        return next((source for source in self.users if source.is_config(config_path)), None)

    def _users_preset(self, source: ConfigSource, config_path: str) -> ConfigResult:
        found, choice = source.load_config(config_path), self._role_and_name(config_path)
        if choice and isinstance(found.config, DictConfig) and "defaults" not in found.config:
            found.config = self._over_plugin_defaults(found.config, *choice)
        return found

    def _over_plugin_defaults(self, values: DictConfig, role: str, name: str) -> DictConfig:
        name = values.get("name", name)
        entry = next((e for e in self.registry.entries(role) if e.component.name == name), None)
        defaults = asdict(entry.component.config()) if entry else {}
        return _open(OmegaConf.merge({"name": name, **defaults}, values))

    def _role_and_name(self, config_path: str) -> tuple[str, str] | None:
        role, _, name = config_path.partition("/")
        is_plugin = role in in_config(self.registry.roles, "one") and name and "/" not in name
        return (role, name) if is_plugin else None

    def _file(self, config_path: str) -> Traversable | None:
        place = config_path.removesuffix(SUFFIX)
        return self.files.get(PRIMARIES[place][0] if place in PRIMARIES else place)


def _parse(text: str, file: Traversable | None) -> DictConfig:
    try:
        values = OmegaConf.create(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not a YAML file: {' '.join(str(error).split())}.") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{file} must hold keys with values, such as `name: fcfs`, but it is a list.")
    return values


def _over_defaults(values: DictConfig, schema: type[Settings], roles: Roles) -> DictConfig:
    values_of = asdict(schema())
    defaults = {name: values_of[name] for name in ordered_names(schema)}
    defaults |= {role: list(roles[role].default) for role in in_config(roles, "several")}
    merged = OmegaConf.merge(defaults, values)
    merged.defaults = _with_roles(merged.get("defaults", []), roles)
    for section in sections(schema):
        _open(merged[section])
    return merged


def _with_roles(defaults: Iterable[Any], roles: Roles) -> list[Any]:
    """A defaults list with the default of each role that it doesn't name, before what it overrides."""
    items = list(defaults)
    named = {str(key) for item in items if isinstance(item, Mapping | DictConfig) for key in item}
    missing = [{role: roles[role].default} for role in in_config(roles, "one") if role not in named]
    is_override = [isinstance(i, Mapping | DictConfig) and str(next(iter(i))).startswith("override ") for i in items]
    place = is_override.index(True) if True in is_override else len(items)
    return [*items[:place], *missing, *items[place:]]


def _open(node: DictConfig) -> DictConfig:
    """Let overrides add keys to `node`: they are checked, with a better message, once the plugin is known."""
    OmegaConf.set_struct(node, False)
    return node


def settings(schema: type[T], composed: DictConfig, registry: Registry) -> T:
    """The settings in a composed config, checked.

    Raises:
        ConfigError: a value that can't be resolved, an unknown key, a value of the wrong type or out of its range.
        PluginError: an unknown plugin.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{error.full_key} can't be resolved: {reason}. A text with ${{...}} in it is written \\${{...}}."
        ) from error
    return schema.from_values(values, registry)
