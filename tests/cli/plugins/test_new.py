"""`nanoflow plugins new`: names and folders that it can't use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.mark.parametrize("name", ["My", "2fast", "a b", "a/b", "..", "auto", "my-", "ä", "a--b"])
def test_bad_names(cli: Cli, name: str) -> None:
    assert cli("plugins", "new", name, "--role", "scheduler").error == (
        f"{name!r} can't be the name of a plugin; write small letters, digits and dashes, such as 'my-scheduler'."
    )
    assert list(Path().iterdir()) == []


def test_a_name_that_is_taken(cli: Cli) -> None:
    error = cli("plugins", "new", "fcfs", "--role", "scheduler").error
    assert error.startswith("There is a scheduler=fcfs from nanoflow ")
    assert error.endswith(" already; take another name.")
    assert cli("plugins", "new", "fcfs", "--role", "model").code == 0


def test_a_folder_that_is_there(cli: Cli) -> None:
    Path("nanoflow-mine").mkdir()
    assert cli("plugins", "new", "mine", "--role", "attention").error == (
        "nanoflow-mine exists already; take another name, or remove it."
    )
    assert list(Path("nanoflow-mine").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["new"], "required: name, --role"),
        (["new", "mine"], "required: --role"),
        (["new", "mine", "--role", "shedule"], "invalid choice: 'shedule'"),
        (["nwe"], "`nanoflow plugins` takes nothing, or `new NAME --role ROLE`; got 'nwe'."),
    ],
)
def test_wrong_usage(cli: Cli, argv: list[str], said: str) -> None:
    outcome = cli("plugins", *argv)
    assert outcome.code == 2
    assert said in outcome.error
