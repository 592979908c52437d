"""Folders of config files that the user names by `--config-dir` and `hydra.searchpath`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigSource
from omegaconf import OmegaConf

from nanoflow.cli.hydra import command_line

FILE = "file"  # the scheme of a path that names none


def named(argv: list[str]) -> list[str]:
    """The folders that a command line names, as Hydra's search path has them: the one that counts first in front."""
    flags = command_line.flags(argv)
    folders = [f"{FILE}://{os.path.abspath(flags.config_dir)}"] if flags.config_dir is not None else []
    for text in flags.overrides:
        override = command_line.parsed(text)
        if override is not None and override.get_key_element() == "hydra.searchpath":
            return folders + _texts(override.value())
    if flags.config_name is not None:
        for source in sources(json.dumps(folders)):
            folders = folders + _texts(_in_primary(source, flags.config_name))
    return folders


def sources(folders: str) -> list[ConfigSource]:
    """Of a JSON list of folders, Hydra's source for each."""
    return list(_sources(json.loads(folders) if folders else []))


def _sources(folders: list[str]) -> Iterator[ConfigSource]:
    for folder in folders:
        scheme, separator, _ = folder.partition("://")
        with suppress(Exception):  # Hydra says what is wrong with it
            yield SourcesRegistry.instance().resolve(scheme if separator else FILE)("nanoflow", folder)


def _in_primary(source: ConfigSource, name: str) -> Any:
    with suppress(Exception):  # Hydra reads it again, and says what is wrong
        return OmegaConf.select(source.load_config(name).config, "hydra.searchpath")
    return None


def _texts(value: Any) -> list[str]:
    items = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []
