"""What can go wrong with a plugin, and the text that its user sees."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import dedent

import pytest

import nanoflow
from nanoflow.core.registry.hookspecs import hookspecs
from nanoflow.core.registry.roles import ROLES
from tests.cli.conftest import Cli, Outcome

VERSION = nanoflow.__version__
SHORT = ("prompts=[HAMLET,JULIET]", "sampling.max_tokens=3")
WARNING = "nanoflow: warning: Plugin 'theirs' of theirs 1.2 was left out: "
HOOK_NAMES = ", ".join(hookspecs(ROLES))
SCHEDULER = """
    from nanoflow import Component, hookimpl
    from nanoflow.core.config import SchedulerConfig
    from nanoflow.plugins.schedulers.fcfs import FCFSScheduler


    class Theirs(FCFSScheduler):
        pass


    @hookimpl
    def nanoflow_schedulers():
        return [Component("theirs", build=Theirs, config=SchedulerConfig)]
"""


def scheduler(body: str) -> dict[str, str]:
    """A package whose scheduler has these methods."""
    return {
        "__init__.py": dedent(SCHEDULER).replace(
            "    pass\n", "    " + dedent(body).strip().replace("\n", "\n    ") + "\n"
        )
    }


def warned(outcome: Outcome) -> str:
    """The one warning of a command that went well."""
    assert outcome.code == 0, outcome.err
    (line,) = outcome.err.splitlines()
    return line


def test_a_broken_import(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": "import wrap"})
    assert warned(cli("run", *SHORT)) == f"{WARNING}ModuleNotFoundError: No module named 'wrap'"


def test_a_misspelt_hook(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER.replace("def nanoflow_schedulers", "def nanoflow_schedulars")})
    assert warned(cli("run", *SHORT)) == (
        f"{WARNING}there is no hook 'nanoflow_schedulars'; there are: {HOOK_NAMES}. Did you mean 'nanoflow_schedulers'?"
    )


def test_a_wrong_signature(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER.replace("_schedulers()", "_schedulers(config, context)")})
    assert warned(cli("run", *SHORT)) == (
        f"{WARNING}hook nanoflow_schedulers takes no arguments, but is defined as nanoflow_schedulers(config, context)"
    )


def test_a_duplicate_name_and_the_way_out(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER})
    install("others", {"__init__.py": SCHEDULER}, version="0.9")
    found = sorted(re.findall(r"from (\w+ [\d.]+)", cli("run", *SHORT).error))
    assert found == ["others 0.9", "theirs 1.2"]
    error = cli("run", *SHORT).error
    assert error.startswith("Two plugins are called scheduler=theirs: one from ")
    assert "; uninstall or rename one of them, or leave one out with --block " in error
    outcome = cli("run", "--block", "others", "scheduler=theirs", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "said"),
    [("scheduler/fcfs", "scheduler=fcfs"), ("attention/auto", "attention=auto"), ("config", "config")],
)
def test_a_config_file_that_shadows_a_builtin(cli: Cli, install: Callable, place: str, said: str) -> None:
    hook = '\n\n    @hookimpl\n    def nanoflow_config_packages():\n        return ["theirs.conf"]\n'
    sources = {"__init__.py": SCHEDULER + hook, f"conf/{place}.yaml": "name: theirs\n",
               "conf/scheduler/hasty.yaml": "name: theirs\nmax_num_seqs: 3\n"}  # fmt: skip
    install("theirs", sources)
    expected = (
        f"nanoflow: warning: The config file {place}.yaml of theirs.conf was left out: {said} is nanoflow's already; "
        "rename the file."
    )
    outcome = cli("run", *SHORT)
    assert warned(outcome) == expected
    assert "scheduler=fcfs" in outcome.out
    assert warned(cli("plugins")) == expected
    assert "scheduler=theirs" in cli("run", "scheduler=hasty", *SHORT).out  # the rest of the package serves


def test_a_config_file_that_shadows_another_package_s_plugin(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER})
    hook = 'from nanoflow import hookimpl\n\n@hookimpl\ndef nanoflow_config_packages():\n    return ["others.conf"]\n'
    install("others", {"__init__.py": hook, "conf/scheduler/theirs.yaml": "name: fcfs\n"})
    outcome = cli("run", "scheduler=theirs", *SHORT)
    assert "scheduler/theirs.yaml of others.conf was left out: scheduler=theirs is theirs's already" in warned(outcome)
    assert "scheduler=theirs" in outcome.out


@pytest.mark.parametrize("specifier", [">=9.1", "<0.1"])
def test_a_plugin_for_another_version(cli: Cli, install: Callable, specifier: str) -> None:
    """It is not imported: what it would find missing is not what is wrong."""
    source = "from nanoflow.core.contracts import WhatIsNotThere"
    install("theirs", {"__init__.py": source}, requires=f"nanoflow-engine[structured]{specifier}")
    assert warned(cli("run", *SHORT)) == (
        f"{WARNING}it is made for nanoflow-engine{specifier}, and this is {VERSION}; install versions of the two that "
        "fit"
    )


@pytest.mark.parametrize("requirement", ["nanoflow", "NanoFlow[testing]>=0.1"])
def test_a_plugin_that_would_bring_another_project(cli: Cli, install: Callable, requirement: str) -> None:
    """`nanoflow` on the package index has the same folder in it, and would overwrite this one's."""
    install("theirs", {"__init__.py": SCHEDULER}, requires=requirement)
    assert warned(cli("run", *SHORT)) == (
        f"{WARNING}its package requires 'nanoflow', which is another project on the package index; require "
        "'nanoflow-engine' instead"
    )


@pytest.mark.slow
def test_a_plugin_for_this_version(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER}, requires=f"nanoflow-engine>={VERSION},<9")
    assert cli("run", "scheduler=theirs", *SHORT).err == ""


@pytest.mark.parametrize("flag", [["--block", "theirs"], ["--block=theirs"]])
def test_a_blocked_plugin(cli: Cli, install: Callable, flag: list[str]) -> None:
    """It is as if it were not there: its import, which would fail, is not tried."""
    install("theirs", {"__init__.py": "import wrap"})
    outcome = cli("run", *flag, *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = cli("plugins", *flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith("\nBlocked: theirs of theirs 1.2\n")
    error = cli("run", *flag, "scheduler=theirs", *SHORT).error
    assert error.startswith("There is no scheduler called 'theirs'; installed are: fcfs, ")
    assert error.endswith(". Blocked: theirs of theirs 1.2.")
    assert "No module named 'wrap'" in cli("plugins").err, "the next command is free again"


def test_blocked_by_the_environment(cli: Cli, install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("theirs", {"__init__.py": "import wrap"})
    install("others", {"__init__.py": "import wrap"})
    monkeypatch.setenv("NANOFLOW_BLOCK", "theirs, others")
    assert cli("run", *SHORT).err == ""
    monkeypatch.setenv("NANOFLOW_BLOCK", "theirs")
    assert cli("run", "--block", "others", *SHORT).err == ""


def test_a_block_that_blocks_nothing(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER})
    assert warned(cli("run", "--block", "thiers", *SHORT)) == (
        "nanoflow: warning: There is no plugin 'thiers' to block; installed are: theirs. Did you mean 'theirs'?"
    )
    outcome = cli("run", "--block")
    assert outcome.code == 2
    assert outcome.error == "--block needs the name of a plugin or of its package; `nanoflow plugins` lists them."


@pytest.mark.slow
def test_a_build_that_raises(cli: Cli, install: Callable) -> None:
    install("theirs", scheduler("def __init__(self, config, context):\n    self.share = config.max_num_seqs / 0"))
    line = 1 + dedent(SCHEDULER).splitlines().index("    pass") + 1
    outcome = cli("run", "scheduler=theirs", *SHORT)
    assert outcome.code == 1
    assert outcome.error == (
        "scheduler=theirs from theirs 1.2 could not be built: ZeroDivisionError: division by zero "
        f"(at theirs/__init__.py:{line}); --debug shows the traceback."
    )
    with pytest.raises(nanoflow.core.config.errors.PluginError) as caught:
        cli("run", "--debug", "scheduler=theirs", *SHORT)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert cli("run", *SHORT).code == 0


def test_a_build_that_makes_something_else(cli: Cli, install: Callable) -> None:
    install("theirs", {"__init__.py": SCHEDULER.replace("build=Theirs", "build=lambda config, context: config")})
    assert cli("run", "scheduler=theirs", *SHORT).error == (
        "scheduler=theirs from theirs 1.2 built a SchedulerConfig, which is no Scheduler; what serves the role "
        "scheduler must derive from that."
    )


def test_a_scheduler_that_breaks_an_invariant(cli: Cli, install: Callable) -> None:
    """Its third batch holds a sequence twice."""
    install("theirs", scheduler("""
        def schedule(self):
            batch = super().schedule()
            if self.num_steps == 3:
                batch.sequences[1] = batch.sequences[0]
            return batch
    """))  # fmt: skip
    outcome = cli("run", "scheduler=theirs", "engine.debug=true", *SHORT)
    assert outcome.code == 1
    assert outcome.error == (
        "scheduler=theirs from theirs 1.2 broke its contract in step 3 with sequence '0': it is in the batch 2 times."
    )
