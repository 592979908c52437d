r"""Double quotes are those of JSON and YAML: "\n" on a command line is a newline."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.cli.hydra.quoting import one_line, unescaped
from tests.cli.conftest import Cli


def value(override: str) -> object:
    return OverridesParser.create().parse_override(unescaped(override)).value()


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_a_json_text_is_what_json_says(text: str) -> None:
    for written in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
        assert value(f"key={written}") == text
        assert value(f"key=[{written},{{a: {written}}}]") == [text, {"a": text}]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (r"""key='a\nb'""", r"a\nb"),  # single quotes are literal
        (r"""key='say \"hi\n\"'""", r"say \"hi\n\""),
        (r'''key="it's\n"''', "it's\n"),
        (r'key="\d+\.\d"', r"\d+\.\d"),  # no escapes of JSON
        (r'key="\${y}"', r"\${y}"),
        (r'key="\ud800"', r"\ud800"),
        (r"key=a\,b", "a,b"),
    ],
)
def test_what_is_no_escape_of_json_stays(override: str, expected: str) -> None:
    assert value(override) == expected


def test_lines_of_a_sweep_stay_one_line() -> None:
    assert one_line('prompts=["a\nb"]') == r'prompts=["a\nb"]'


def test_prompts_and_stop_strings_on_the_command_line(cli: Cli) -> None:
    outcome = cli("run", "--cfg", "job", r'prompts=["HAMLET:\n", "b"]', r'sampling.stop=["\n\n"]')
    composed = yaml.safe_load(outcome.out)
    assert composed["prompts"] == ["HAMLET:\n", "b"]
    assert composed["sampling"]["stop"] == ["\n\n"]


def test_what_the_help_prints_can_be_copied(cli: Cli) -> None:
    """Each KEY=DEFAULT of the help, given back to the command as a shell reads it, changes nothing."""
    out = cli("run", "--help").out.partition("Keys (KEY=VALUE)")[2].partition("With ")[0]
    written = [line.strip() for line in out.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    overrides = [shlex.split(line.partition("  ")[0])[0] for line in written]
    assert "engine.seed=0" in overrides
    assert any(override.startswith('prompts=["HAMLET:\\n"') for override in overrides)
    given_back = cli("run", "--cfg", "job", *overrides)
    assert (given_back.code, given_back.out) == (0, cli("run", "--cfg", "job").out)


def test_one_prompt_needs_no_list(cli: Cli) -> None:
    outcome = cli("run", "prompts=Hello", "sampling.max_tokens=2")
    assert outcome.code == 0
    assert "1 prompt, " in outcome.out


@pytest.mark.parametrize("name", ["/path/to/model", "Qwen/Qwen3-0.6B", "./bard"])
def test_a_checkpoint_given_as_the_model(cli: Cli, name: str) -> None:
    outcome = cli("run", f"model={name}")
    assert f"write checkpoint={name}." in outcome.error
    assert outcome.code == 1


@pytest.mark.parametrize("argument", ["Hello", "prompts=[It's a trap]"])
def test_a_prompt_without_its_key_or_its_quotes(cli: Cli, argument: str) -> None:
    outcome = cli("run", argument)
    assert "A prompt is written 'prompts=\"" in outcome.error
    assert outcome.code == 2


def test_a_text_with_the_signs_of_an_interpolation(cli: Cli) -> None:
    outcome = cli("run", 'prompts="it costs ${y}"')
    assert outcome.error.endswith(r"A text with ${...} in it is written \${...}.")
    composed = cli("run", "--cfg", "job", "--resolve", r'prompts="it costs \${y}"')
    assert yaml.safe_load(composed.out)["prompts"] == "it costs ${y}"
