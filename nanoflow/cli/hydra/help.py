"""`--help` of a Hydra command: groups, their options, and every key with its default, from what is installed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nanoflow.cli.hydra.command import HydraCommand
from nanoflow.cli.hydra.config_source import NanoflowSource
from nanoflow.cli.settings.schema import PLUGINS, Settings, sections
from nanoflow.core.registry.component import Entry
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import in_config

WIDTH = 40  # of the column with keys
FLAGS = """
Flags:
  -m, --multirun      sweep: values with commas between them make jobs; results are kept in runs/
  --cfg job           show the composed config, and run nothing
  --info [TOPIC]      how the config came about: defaults, defaults-tree, searchpath, ...
  --config-name NAME  another primary config than {file}.yaml;  --config-dir DIR  a folder that holds it
  --hydra-help        more of Hydra's flags
  --debug             show the traceback of an error
  --verbose           tell of plugins, slow steps, preemptions and steps that no CUDA graph fits, on standard error
  --block NAME        leave the plugin or the package of that name alone, as if it were not installed
"""


def text(command: HydraCommand, registry: Registry) -> str:
    """The whole help text."""
    source = NanoflowSource()
    primary = source.load_config(command.primary).config
    head = command.intro + FLAGS.format(file=command.file)
    keys = _command_keys(command.schema, primary)
    return "\n".join([head, *_groups(source, primary, registry), *keys, *_plugin_keys(source, registry)])


def _groups(source: NanoflowSource, primary: DictConfig, registry: Registry) -> Iterator[str]:
    defaults = {role: name for item in primary.defaults if isinstance(item, DictConfig) for role, name in item.items()}
    yield "Groups (GROUP=OPTION):"
    for role in in_config(registry.roles, "one"):
        names = (f"{n} (default)" if n == defaults[role] else n for n in source.list(role, None))
        yield f"  {role:<15} {', '.join(names)}"
    yield ""
    yield from _lists(registry)


def _lists(registry: Registry) -> Iterator[str]:
    """The roles that several plugins serve, and those from which requests choose."""
    several = in_config(registry.roles, "several")
    by_request = [role for role in registry.roles if role not in in_config(registry.roles)]
    for title, roles in {
        "Lists (LIST=[NAME,{name: NAME, OPTION: VALUE}]):": several,
        "By request (sampling.ROLE={NAME: {OPTION: VALUE}}):": by_request,
    }.items():
        if roles:
            yield title
            for role in roles:
                yield f"  {role:<15} {', '.join(entry.component.name for entry in registry.entries(role)) or 'none'}"
            yield ""


def _command_keys(schema: type[Settings], primary: DictConfig) -> Iterator[str]:
    yield "Keys (KEY=VALUE), their defaults, and what they mean:"
    yield from _lines(schema, primary, "", skip={*sections(schema), PLUGINS})
    for name, section in sections(schema).items():
        yield ""
        yield from _lines(section, primary[name], f"{name}.")
    yield ""


def _plugin_keys(source: NanoflowSource, registry: Registry) -> Iterator[str]:
    for role in in_config(registry.roles):
        for entry in registry.entries(role):
            if fields(entry.component.config):
                yield from _options(entry, source)
                yield ""


def _options(entry: Entry, source: NanoflowSource) -> Iterator[str]:
    role, name, schema = entry.role.name, entry.component.name, entry.component.config
    if entry.role.cardinality == "one":
        yield f"With {role}={name}:"
        yield from _lines(schema, source.load_config(f"{role}/{name}").config, f"{role}.")
    else:
        yield f"With {role}=[{{name: {name}, OPTION: VALUE}}]:"
        yield from _lines(schema, OmegaConf.create(asdict(schema())), "")


def _lines(schema: type, values: DictConfig, prefix: str, skip: Iterable[str] = ()) -> Iterator[str]:
    for item in fields(schema):
        if item.name not in skip:
            key = f"{prefix}{item.name}={_written(values[item.name])}"
            break_or_space = "\n" + " " * WIDTH if len(key) > WIDTH - 4 else " " * (WIDTH - 2 - len(key))
            yield f"  {key}{break_or_space}{item.metadata.get('help', '')}".rstrip()


def _written(value: Any) -> str:
    """A value as it is written in an override, quoted for a shell where that is needed."""
    if isinstance(value, str):
        return shlex.quote(value) if value else "''"
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    written = json.dumps(plain, ensure_ascii=False)
    return shlex.quote(written) if '"' in written else written
