"""What follows from a row of the table: hooks, choices, and the objects that are built."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import is_dataclass

import pytest

from nanoflow.core.api.options import config_from_options
from nanoflow.core.config.engine_config import Config, PluginChoice
from nanoflow.core.config.errors import ConfigError, PluginError, RequestError
from nanoflow.core.registry.hookspecs import CONFIG_PACKAGES, hookspecs
from nanoflow.core.registry.registry import AUTO, Registry
from nanoflow.core.registry.roles import ROLES, Role, in_config
from tests.core.registry.tables import POINTS, TABLE, FilterContext, Loud, Quiet, Short, WatcherContext
from tests.core.sentences import raises_sentence


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load(strict=True, extra=POINTS, roles=TABLE)


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
def test_a_row(role: Role) -> None:
    assert ROLES[role.name] is role
    assert inspect.getdoc(role.product)
    assert is_dataclass(role.context)
    assert role.hook.startswith("nanoflow_")
    names = [role.default] if isinstance(role.default, str) else role.default
    assert (len(names) == 1) == (role.cardinality == "one")
    known = [entry.component.name for entry in Registry.load(extra=[]).entries(role.name)]
    assert set(names) <= {*known, AUTO}


def test_the_order_is_that_of_the_table() -> None:
    assert list(ROLES)[:4] == ["model", "attention", "scheduler", "block_manager"]
    assert in_config(TABLE)[-1] == "watchers"
    assert in_config(TABLE, "several")[-1] == "watchers"
    assert "filters" not in in_config(TABLE)


def test_hooks_follow_from_the_table() -> None:
    hooks = hookspecs(TABLE)
    assert list(hooks) == [*(role.hook for role in TABLE.values()), CONFIG_PACKAGES]
    assert hooks["nanoflow_watchers"].__name__ == "nanoflow_watchers"
    assert "`Component.build(config, WatcherContext)`" in (hooks["nanoflow_watchers"].__doc__ or "")
    (problem,) = Registry.load(extra=POINTS).problems  # without these roles
    assert "there is no hook 'nanoflow_filters'" in problem


def test_several_are_built_in_the_order_in_which_they_are_chosen(registry: Registry) -> None:
    choices = (PluginChoice("quiet"), PluginChoice("loud", {"times": 2}), PluginChoice("loud"))
    quiet, twice, once = registry.build_several("watchers", choices, WatcherContext("here"))
    assert isinstance(quiet, Quiet)
    assert isinstance(twice, Loud)
    assert twice.on_thing("boo") == "here: BOO here: BOO"
    assert once.on_thing("boo") == "here: BOO"
    assert registry.build_several("watchers", Config().plugins.get("watchers"), WatcherContext("here")) == []


def test_what_is_wrong_with_one_of_several(registry: Registry) -> None:
    def build(name: str, **options: object) -> None:
        registry.build_several("watchers", (PluginChoice(name, options),), WatcherContext("here"))

    with raises_sentence(
        PluginError, "There is no watcher called 'lout'; installed are: far, loud, quiet.", "Did you mean 'loud'?"
    ):
        build("lout")
    with raises_sentence(PluginError, "watchers=far can't be used here: it is not here."):
        build("far")
    with raises_sentence(ConfigError, "watchers=loud has no option 'time'; it has: times.", "Did you mean 'times'?"):
        build("loud", time=3)
    with raises_sentence(ConfigError, "watchers.times must be an integer >= 1, got 0."):
        build("loud", times=0)


def test_requests_choose_from_what_can_be_used(registry: Registry) -> None:
    """What can't be built harms only those who ask for it."""
    filters = registry.build_by_request("filters", FilterContext("here"))
    assert list(filters) == ["short"]
    assert isinstance(filters["short"], Short)
    assert filters["short"] is filters["short"], "built once"
    assert "broken" not in filters
    for name, sentence in {
        "far": "filters=far can't be used here: it is not here.",
        "choosy": "filters=choosy can't be used here: it does not like here.",
        "broken": "filters=broken from watching 1.2.3 could not be built: ZeroDivisionError: division by zero",
        "shortt": "There is no filter called 'shortt'; installed are: short. Did you mean 'short'?",
    }.items():
        with raises_sentence(RequestError, sentence):
            filters[name]


def test_keywords_choose_several(registry: Registry) -> None:
    options = {"watchers": ["quiet", {"name": "loud", "times": 2}], "scheduler": "lpm", "max_num_seqs": 3}
    config = config_from_options(registry, None, options)
    assert config.plugins == {
        "model": PluginChoice("auto"), "attention": PluginChoice("auto"),
        "scheduler": PluginChoice("lpm", {"max_num_seqs": 3}), "block_manager": PluginChoice("prefix"),
        **dict.fromkeys(in_config(ROLES, "several"), ()),
        "watchers": (PluginChoice("quiet"), PluginChoice("loud", {"times": 2})),
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(config)) == config
    assert config_from_options(registry, None, {}).plugins["watchers"] == ()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("loud", "watchers must be a list of plugins, got 'loud'; write watchers=[...]."),
        (None, "watchers must be a list of plugins, got None; write watchers=[...]."),
        ([3], "Each item of watchers must be the name of a plugin, or a mapping with its name and options, got 3."),
        ([{"times": 3}], "Each item of watchers must be the name of a plugin"),
        (["loudd"], "There is no watcher called 'loudd'"),
        ([{"name": "loud", "time": 3}], "watchers=loud has no option 'time'"),
        ([{"name": "loud", "times": 0}], "watchers.times must be an integer >= 1, got 0."),
    ],
)
def test_keywords_that_choose_none(registry: Registry, value: object, sentence: str) -> None:
    with raises_sentence(PluginError if "There is no" in sentence else ConfigError, sentence):
        config_from_options(registry, None, {"watchers": value})


def test_a_role_by_request_is_no_keyword(registry: Registry) -> None:
    with raises_sentence(ConfigError, "LLM() has no option 'filters'"):
        config_from_options(registry, None, {"filters": ["short"]})
