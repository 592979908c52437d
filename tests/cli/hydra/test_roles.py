"""Roles that several plugins serve, or from which requests choose, on the command line: with a table of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoflow.core.registry.registry import Registry
from tests.cli.conftest import Cli
from tests.core.registry.tables import POINTS, TABLE

SHORT = ("prompts=[HAMLET]", "sampling.max_tokens=2")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the plugins of `tests.core.registry.tables`, for all that loads a registry."""
    load = Registry.load.__func__  # type: ignore[attr-defined]

    def with_table(cls: type[Registry], **options: Any) -> Registry:
        return load(cls, **{"extra": POINTS, "roles": TABLE, **options})

    monkeypatch.setattr(Registry, "load", classmethod(with_table))


def composed(cli: Cli, *overrides: str) -> Any:
    outcome = cli("run", "--cfg", "job", *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    return yaml.safe_load(outcome.out)["watchers"]


def test_a_list_of_plugins(cli: Cli) -> None:
    assert composed(cli) == []
    assert composed(cli, "watchers=[quiet,{name: loud, times: 2}]") == ["quiet", {"name": "loud", "times": 2}]
    Path("mine.yaml").write_text("defaults: [config, _self_]\nwatchers: [loud]\n")
    assert composed(cli, "--config-dir=.", "--config-name=mine") == ["loud"]


def test_it_reaches_the_engine(cli: Cli) -> None:
    outcome = cli("run", "watchers=[quiet,{name: loud, times: 2}]", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("watchers=loud", "watchers must be a list of plugins, got 'loud'; write watchers=[...]."),
        ("watchers=null", "watchers must be a list of plugins, got None; write watchers=[...]."),
        ("watchers=[loudd]", "There is no watcher called 'loudd'; installed are: far, loud, quiet. Did you mean"),
        ("watchers=[3]", "Each item of watchers must be the name of a plugin"),
        (
            "watchers=[{name: loud, time: 2}]",
            "watchers=loud has no option 'time'; it has: times. Did you mean",
        ),
        ("watchers=[{name: loud, times: many}]", "watchers.times must be an integer, got 'many'."),
        ("watchers=[{name: loud, times: 0}]", "watchers.times must be an integer >= 1, got 0."),
        ("watcher=[loud]", "There is no key 'watcher'. Did you mean 'watchers'?"),
        ("+filters=[short]", "There is no key 'filters'"),
    ],
)
def test_what_is_wrong(cli: Cli, override: str, sentence: str) -> None:
    assert sentence in cli("run", override, *SHORT).error


def test_a_sweep_over_lists(cli: Cli) -> None:
    outcome = cli("run", "-m", "watchers=[],[quiet]", *SHORT)
    assert outcome.code == 0
    assert outcome.out.count("| ok") == 2


def test_help_and_the_listing_know_them(cli: Cli) -> None:
    out = cli("run", "--help").out
    assert "\n  watchers        far, loud, quiet\n" in out
    assert "\n  filters         broken, choosy, far, short\n" in out
    assert "With watchers=[{name: loud, OPTION: VALUE}]:\n  times=1 " in out
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in cli("plugins").out.splitlines()]
    assert ("watchers", "loud", "watching", "1.2.3", "yes") in rows
    assert ("filters", "far", "watching", "1.2.3", "no: it is not here.") in rows


def test_a_file_for_one_of_several_is_left_out(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "presets" / "watchers").mkdir(parents=True)
    (tmp_path / "site" / "presets" / "watchers" / "loudest.yaml").write_text("name: loud\ntimes: 9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugin = type("Presets", (), {"nanoflow_config_packages": lambda self: ["presets"]})
    from nanoflow import hookimpl
    from tests.core.scripted import entry_point

    hookimpl(plugin.nanoflow_config_packages)
    load = Registry.load
    monkeypatch.setattr(Registry, "load", lambda **options: load(extra=[*POINTS, entry_point(plugin(), "presets")]))
    outcome = cli("run", "watchers=[loud]", *SHORT)
    assert outcome.code == 0
    assert outcome.err == (
        "nanoflow: warning: The config file watchers/loudest.yaml of presets was left out: watchers are chosen by "
        "their names, with options beside these, and not by files.\n"
    )
