"""Plugins come in through entry points; one that is broken is reported and left out."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow import Component, __version__, hookimpl
from nanoflow.core.config.engine_config import PluginChoice, SchedulerConfig
from nanoflow.core.config.errors import ConfigError, PluginError
from nanoflow.core.config.fields import option, require
from nanoflow.core.registry.component import NoOptions
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES
from tests.core.scripted import entry_point
from tests.core.sentences import raises_sentence


@dataclass(frozen=True)
class Options:
    """Options of a plugin in these tests."""

    size: int = option(3, "how large")

    def __post_init__(self) -> None:
        require(self.size > 0, "attention.size", self.size, "an integer > 0")


def component(name: str = "theirs", **attributes: Any) -> Component:
    return Component(name, **{"build": lambda config, context: (name, config), **attributes})


def plugin(answer: Any, role: str = "attention") -> Any:
    """A plugin whose hook for `role` returns `answer`, or raises it."""

    def hook() -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    hook.__name__ = ROLES[role].hook if role in ROLES else role
    return SimpleNamespace(**{hook.__name__: hookimpl(hook)})


def load(*answers: Any, role: str = "attention", strict: bool = False) -> Registry:
    points = [entry_point(plugin(answer, role), f"p{i}", f"package{i}") for i, answer in enumerate(answers)]
    return Registry.load(strict=strict, extra=points)


def names(registry: Registry, role: str = "attention") -> list[str]:
    return [entry.component.name for entry in registry.entries(role)]


def test_builtin_plugins() -> None:
    registry = Registry.load(strict=True, extra=[])
    assert registry.problems == []
    for role, name in {"model": "qwen3", "attention": "torch", "scheduler": "fcfs", "block_manager": "prefix"}.items():
        entry = registry.get(role, name)
        assert (entry.package, entry.version) == ("nanoflow", __version__)
        assert str(entry) == f"{role}={name} from nanoflow {__version__}"


@pytest.mark.parametrize("role", ROLES)
def test_third_party_plugin(role: str) -> None:
    config = SchedulerConfig if role == "scheduler" else NoOptions
    registry = load([component(config=config)], role=role, strict=True)
    assert str(registry.get(role, "theirs")) == f"{role}=theirs from package0 1.2.3"
    assert set(names(registry, role)) == {*names(Registry.load(extra=[]), role), "theirs"}


def test_two_packages_may_name_their_entry_points_alike() -> None:
    """The name of an entry point is the package's own affair; the names of components are what must differ."""
    points = [entry_point(plugin([component(name)]), "plugin", name) for name in ("one", "two")]
    registry = Registry.load(extra=points)
    assert registry.problems == []
    assert {"one", "two"} <= set(names(registry))


def test_an_entry_point_named_as_a_builtin_package_does_not_drop_it() -> None:
    registry = Registry.load(extra=[entry_point(plugin([component()]), "nanoflow.plugins.attention")])
    assert "torch" in names(registry)


def test_class_based_plugin() -> None:
    class Plugin:
        @hookimpl
        def nanoflow_attention_backends(self) -> list[Component]:
            return [component()]

        @hookimpl
        def nanoflow_config_packages(self) -> list[str]:
            return ["tests.core"]

    registry = Registry.load(strict=True, extra=[entry_point(Plugin())])
    assert "theirs" in names(registry)
    assert registry.config_packages == {"tests.core": "their-package"}


def misspelt() -> Any:
    def nanoflow_atention_backends() -> list[Component]:
        return []

    return SimpleNamespace(nanoflow_atention_backends=hookimpl(nanoflow_atention_backends))


BROKEN = {
    "import": (ImportError("No module named 'flash'\nand more"), "ImportError: No module named 'flash'"),
    "syntax": (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
    "misspelt": (misspelt(), "nanoflow_atention_backends"),
    "raises": (plugin(RuntimeError("no luck")), "RuntimeError: no luck"),
    "no list": (plugin(component()), "hook nanoflow_attention_backends returned Component, not a list"),
    "nothing": (plugin(None), "hook nanoflow_attention_backends returned NoneType, not a list"),
    "no component": (plugin(["torch"]), "returned a list with a str, not a Component"),
    "config": (plugin([component(config=dict)]), "the config of attention=theirs is not a dataclass"),
    "option": (plugin([component(config=dataclass(type("Bare", (), {"__annotations__": {"size": int}})))]), "size"),
    "folder": (plugin(["no_such_package"], "nanoflow_config_packages"), "no_such_package"),
    "folders": (plugin(3, "nanoflow_config_packages"), "hook nanoflow_config_packages returned int, not a list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_left_out(kind: str) -> None:
    broken, reason = BROKEN[kind]
    good = plugin([component("good")])
    points = [entry_point(good, "before", "good-package"), entry_point(broken, "bad", "bad-package")]
    registry = Registry.load(extra=points)
    (problem,) = registry.problems
    assert problem.startswith("Plugin 'bad' of bad-package 1.2.3 was left out: ")
    assert reason in problem
    assert "\n" not in problem
    assert set(names(registry)) == set(names(Registry.load(extra=[]))) | {"good"}
    with raises_broken(problem):
        Registry.load(strict=True, extra=points)


def raises_broken(problem: str) -> Any:
    import re

    return pytest.raises(PluginError, match=f"^{re.escape(problem)}$")


class Odd(BaseException):
    """No `Exception`."""


def imported_with(error: BaseException) -> Any:
    """An entry point whose import raises that."""

    def load() -> Any:
        raise error

    return SimpleNamespace(name="bad", dist=entry_point(None, "bad", "bad-package").dist, load=load)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Odd("x"), GeneratorExit()])
def test_a_plugin_ends_nothing_whatever_it_raises(error: BaseException) -> None:
    for points in ([imported_with(error)], [entry_point(plugin(error), "bad", "bad-package")]):
        (problem,) = Registry.load(extra=points).problems
        what = f"{type(error).__name__}: {error if str(error) else 'no message'}"
        assert problem == f"Plugin 'bad' of bad-package 1.2.3 was left out: {what}"
        with raises_broken(problem):
            Registry.load(strict=True, extra=points)


def test_ctrl_c_while_plugins_are_imported_is_the_users() -> None:
    def load() -> Any:
        signal.raise_signal(signal.SIGINT)

    point = SimpleNamespace(name="slow", dist=entry_point(None, "slow", "slow-package").dist, load=load)
    with pytest.raises(KeyboardInterrupt):
        Registry.load(extra=[point])


@pytest.mark.parametrize("name", ["../../x\n", 5, "", "a b", "-x", "a=b", None, "x" * 100 + "/", ["a"]])
def test_names_that_cannot_be_written(name: Any) -> None:
    registry = load([component(name)], [component("fine")])
    (problem,) = registry.problems
    assert problem.startswith("Plugin 'p0' of package0 1.2.3 was left out: a component of hook nanoflow_attention_")
    assert problem.isprintable()
    assert "fine" in names(registry)


def test_a_plugin_that_leaves_while_it_is_built() -> None:
    def build(config: Any, context: Any) -> Any:
        raise SystemExit(3)

    entry = load([component(build=build)]).get("attention", "theirs")
    with raises_sentence(PluginError, "attention=theirs from package0 1.2.3 could not be built: SystemExit: 3"):
        entry.build(NoOptions(), None)


def test_a_broken_plugin_does_not_stop_those_after_it() -> None:
    registry = load(RuntimeError("no luck"), [component("good")])
    assert "good" in names(registry)
    assert len(registry.problems) == 1


def test_two_plugins_of_one_name() -> None:
    words = ["attention=theirs", "package0 1.2.3", "package1 1.2.3", "uninstall or rename"]
    with raises_sentence(PluginError, *words):
        load([component()], [component()])
    with raises_sentence(PluginError, "attention=torch", f"nanoflow {__version__}", "package0 1.2.3"):
        load([component("torch")])


def test_one_name_in_two_roles_is_fine() -> None:
    assert "fcfs" in names(load([component("fcfs")]))


def test_unknown_name() -> None:
    with raises_sentence(
        PluginError, "There is no attention called 'their'; installed are: ", "Did you mean 'theirs'?"
    ):
        load([component()]).get("attention", "their")


def test_auto_takes_the_highest_priority_that_can_serve() -> None:
    registry = load([
        component("absent", priority=105, available=lambda: "the package is missing."),
        component("narrow", priority=104, supports=lambda config, context: f"it can't serve {context}."),
        component("second", priority=102, config=Options), component("third", priority=101),
        component("last", priority=-1),
    ])  # fmt: skip
    assert names(registry)[:4] == ["absent", "narrow", "second", "third"]
    entry, config = registry.resolve("attention", PluginChoice("auto"), "this")
    assert (entry.component.name, config) == ("second", Options())
    with raises_sentence(PluginError, "attention=absent can't be used here: the package is missing."):
        registry.resolve("attention", PluginChoice("absent"), "this")
    with raises_sentence(PluginError, "attention=narrow can't be used here: it can't serve this."):
        registry.resolve("attention", PluginChoice("narrow"), "this")
    assert registry.resolve("attention", PluginChoice("last"), "this")[0].component.name == "last"


def test_auto_prefers_by_name_among_equals() -> None:
    registry = load([component("b", priority=109), component("a", priority=109)])
    assert registry.resolve("attention", PluginChoice("auto"), None)[0].component.name == "a"


def test_auto_with_nothing_that_can_serve() -> None:
    entries = load([component(available=lambda: "it needs a GPU.")]).entries("attention")
    registry = Registry([entry for entry in entries if entry.component.name == "theirs"], [], [])
    with raises_sentence(PluginError, "No attention can serve here. theirs: it needs a GPU."):
        registry.resolve("attention", PluginChoice("auto"), None)


def test_auto_takes_no_options() -> None:
    with raises_sentence(ConfigError, "attention=auto takes no options; name the attention that size is for."):
        load([component()]).resolve("attention", PluginChoice("auto", {"size": 3}), None)


def test_options() -> None:
    registry = load([component(config=Options), component("bare")])

    def resolve(name: str, **options: Any) -> Any:
        return registry.resolve("attention", PluginChoice(name, options), None)[1]

    assert resolve("theirs") == Options(3)
    assert resolve("theirs", size=5) == Options(5)
    assert resolve("bare") == NoOptions()
    with raises_sentence(ConfigError, "attention=theirs has no option 'sise'; it has: size.", "Did you mean 'size'?"):
        resolve("theirs", sise=5)
    with raises_sentence(ConfigError, "attention=bare has no option 'size'; it has no options."):
        resolve("bare", size=5)
    with raises_sentence(ConfigError, "attention.size must be an integer > 0, got 0."):
        resolve("theirs", size=0)


def test_models_are_chosen_by_architecture() -> None:
    registry = load(
        [component("one", architectures=("A", "B")), component("two", architectures=("B",), priority=1)], role="model"
    )

    def choose(name: str, *architectures: str) -> str:
        return registry.model_for(PluginChoice(name), list(architectures))[0].component.name

    assert choose("auto", "A") == "one"
    assert choose("auto", "B") == "two"
    assert choose("auto", "X", "A") == "one"
    assert choose("one", "B") == "one"
    with raises_sentence(PluginError, "model=two serves B, but the checkpoint is of A; use model=auto or model=one."):
        choose("two", "A")
    with raises_sentence(PluginError, "No model plugin serves this checkpoint (C); served are: A, B, Llama"):
        choose("auto", "C")
    with raises_sentence(PluginError, "no named architecture"):
        choose("auto")


def test_a_model_that_is_not_available() -> None:
    registry = load([component("one", architectures=("A",), available=lambda: "it needs a GPU.")], role="model")
    with raises_sentence(PluginError, "model=one can't be used here: it needs a GPU."):
        registry.model_for(PluginChoice("auto"), ["A"])
