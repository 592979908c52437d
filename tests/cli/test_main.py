"""The command line as a whole: dispatch, exit codes, and what must not be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nanoflow
from nanoflow.cli.main import COMMANDS, main
from nanoflow.cli.run import job
from nanoflow.core.config.errors import ConfigError, NanoflowError
from tests.cli.conftest import Cli


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_names_every_command(cli: Cli, argv: tuple[str, ...]) -> None:
    outcome = cli(*argv)
    assert outcome.code == 0
    assert all(f"  {name} " in outcome.out for name in COMMANDS)


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"nanoflow {nanoflow.__version__}\n"


def test_an_unknown_command_is_wrong_usage(cli: Cli) -> None:
    outcome = cli("rnu")
    assert outcome.code == 2
    assert "Did you mean 'run'?" in outcome.error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: nanoflow {command}")


def test_plugins_takes_no_arguments(cli: Cli) -> None:
    outcome = cli("plugins", "all")
    assert outcome.code == 2
    assert "'all'" in outcome.error


def test_debug_keeps_the_exception(cli: Cli) -> None:
    with pytest.raises(ConfigError, match=r"engine\.sede"):
        cli("run", "--debug", "engine.sede=1")


def test_a_bug_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "run", _raise(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("run")


def test_ctrl_c_is_quiet(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "run", _raise(KeyboardInterrupt()))
    outcome = cli("run")
    assert (outcome.code, outcome.err) == (130, "")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoflow", "run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == 141


def test_a_terminal_without_unicode_does_not_end_a_run() -> None:
    code = (
        "import nanoflow.cli.plugins.command as plugins; plugins.USAGE = 'caf\\xe9 \\u2603'\n"
        "from nanoflow.cli.main import main; main(['plugins', '-h'])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=True, timeout=60
    )
    assert process.stdout == b"caf\\xe9 \\u2603\n"


@pytest.mark.parametrize(
    "argv", [["--help"], ["plugins"], ["run", "--help"], ["run", "--cfg", "job"], ["run", "engine.sede=1"]]
)
def test_what_needs_no_engine_imports_no_torch(argv: list[str]) -> None:
    _assert_light(f"from nanoflow.cli.main import main; main({argv!r})")


def test_importing_the_package_imports_no_torch() -> None:
    _assert_light(
        "import nanoflow; nanoflow.hookimpl, nanoflow.Component, nanoflow.SamplingParams, nanoflow.NanoflowError"
    )


def test_main_reads_the_process_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nanoflow", "--version"])
    assert main() == 0
    assert nanoflow.__version__ in capsys.readouterr().out


def _assert_light(code: str) -> None:
    code += "; import sys; print('HEAVY', sorted({'torch', 'transformers'} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.endswith("HEAVY []\n")


def _raise(error: BaseException):
    def raiser(*args: object, **options: object) -> None:
        raise error

    return raiser


@pytest.mark.slow
def test_errors_of_every_kind_have_exit_code_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in NanoflowError.__subclasses__():
        if kind.__module__ == "nanoflow.core.config.errors":
            monkeypatch.setattr(job, "run", _raise(kind("It went wrong.")))
            outcome = cli("run")
            assert (outcome.code, outcome.error) == (1, "It went wrong.")
