"""A plugin that was made for another version of the contract is told what has changed since."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow import Component, hookimpl
from nanoflow.core.config.errors import PluginError
from nanoflow.core.registry.contract import CONTRACT, Change, Contract
from nanoflow.core.registry.registry import Registry
from tests.core.scripted import entry_point
from tests.core.sentences import raises_sentence

LATER = Contract(
    4,
    (
        Change(2, "`Scheduler.pause` is new and must be there.", roles=("scheduler",)),
        Change(3, "`Batch.rows` is called `slots`.", roles=("attention", "scheduler")),
        Change(4, "`option` takes the help line by name.", traces=("option",)),
    ),
)


def loaded(contract: Contract, **attributes: Any) -> Registry:
    """The registry with a scheduler whose module has these attributes."""

    @hookimpl
    def nanoflow_schedulers() -> list[Component]:
        from nanoflow.core.config.engine_config import SchedulerConfig

        return [Component("theirs", build=None, config=SchedulerConfig)]

    plugin = SimpleNamespace(nanoflow_schedulers=nanoflow_schedulers, **attributes)
    return Registry.load(extra=[entry_point(plugin)], contract=contract)


@pytest.mark.parametrize("attributes", [{}, {"nanoflow_contract": 1}], ids=["undeclared", "declared"])
def test_a_plugin_for_this_version(attributes: dict[str, Any]) -> None:
    registry = loaded(CONTRACT, **attributes)
    assert registry.problems == []
    assert registry.get("scheduler", "theirs")


@pytest.mark.parametrize("attributes", [{}, {"nanoflow_contract": 1}], ids=["undeclared", "declared"])
def test_a_plugin_for_an_older_version_is_told_what_changed(attributes: dict[str, Any]) -> None:
    """Who declares nothing is taken to know the first version alone."""
    (problem,) = loaded(LATER, **attributes).problems
    assert problem == (
        "Plugin 'theirs' of their-package 1.2.3 was left out: it is made for contract 1, and this is contract 4. "
        "Contract 2: `Scheduler.pause` is new and must be there. Contract 3: `Batch.rows` is called `slots`. "
        "Contract 4: `option` takes the help line by name."
    )


def test_what_changed_for_other_roles_does_not_matter() -> None:
    only = Contract(4, (Change(2, "...", roles=("attention",)), Change(3, "...", roles=("model",))))
    assert loaded(only, nanoflow_contract=1).problems == []
    (problem,) = loaded(LATER, nanoflow_contract=2).problems
    assert "Contract 2" not in problem
    assert "Contract 3: `Batch.rows`" in problem


def test_a_plugin_for_a_later_version() -> None:
    (problem,) = loaded(CONTRACT, nanoflow_contract=CONTRACT.version + 1).problems
    assert problem.endswith(
        f"it is made for contract {CONTRACT.version + 1}, and this nanoflow has contract {CONTRACT.version}; install a "
        "newer nanoflow"
    )


@pytest.mark.parametrize("value", ["1", 1.5, None, -1, True])
def test_what_is_no_version(value: object) -> None:
    (problem,) = loaded(CONTRACT, nanoflow_contract=value).problems
    assert problem.endswith(f"nanoflow_contract must be the number of a contract version, got {value!r}")


def test_an_import_that_fails_for_a_change_is_explained() -> None:
    gone = ModuleNotFoundError("No module named 'nanoflow.core.interfaces'", name="nanoflow.core.interfaces")
    (problem,) = Registry.load(extra=[entry_point(gone)]).problems
    assert "ModuleNotFoundError: No module named 'nanoflow.core.interfaces'. Contract 1: plugins import from" in problem
    (problem,) = Registry.load(extra=[entry_point(ImportError("No module named 'flash'"))]).problems
    assert problem.endswith("No module named 'flash'")
    with raises_sentence(PluginError, "No module named 'nanoflow.core.interfaces'", "Contract 1:"):
        Registry.load(strict=True, extra=[entry_point(gone)])


def test_the_changes() -> None:
    """Sentences, by rising version, up to the present one."""
    versions = [change.version for change in CONTRACT.changes]
    assert versions == sorted(versions)
    assert versions[-1] == CONTRACT.version
    assert all(change.what.endswith(".") for change in CONTRACT.changes)
    assert CONTRACT.undeclared == 1, "who says nothing keeps being taken for the first version that could be declared"
