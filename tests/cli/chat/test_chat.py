"""`nanoflow chat`, driven through a pseudo-terminal as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoflow.cli.chat import keyboard
from nanoflow.cli.chat.turns import end_of_turn
from nanoflow.core.text.load_tokenizer import load_tokenizer
from tests.cli.conftest import Cli

BUNDLED = Path(__file__).parents[3] / "nanoflow" / "assets" / "bard"
PROMPT = "> "
RATE = r"\[(\d+) tokens, [\d,.]+ tok/s, (\w+)\]"


class Terminal:
    """A command that runs in a terminal of its own."""

    def __init__(self, *argv: str, state: str = os.devnull) -> None:
        self.pid, self.leader = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
            os.environ |= {"NO_COLOR": "1", "TERM": "dumb", "XDG_STATE_HOME": state}
            os.execv(sys.executable, [sys.executable, "-m", "nanoflow", *argv])
        self.unread = ""
        self.code: int | None = None

    def type(self, keys: str) -> None:
        os.write(self.leader, keys.encode())

    def until(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait for something to be shown, and read up to it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.unread)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.unread!r}"
            if select.select([self.leader], [], [], 0.1)[0]:
                try:
                    self.unread += os.read(self.leader, 1 << 16).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended; {pattern!r} is not in {self.unread!r}") from None
        self.unread = self.unread[match.end() :]
        return match

    def interrupt(self) -> None:
        """Ctrl-C where a line is typed, until there is a prompt again: the line editor misses a signal that comes
        between two of its waits."""
        for _ in range(20):
            time.sleep(0.3)  # a person is no faster
            self.type("\x03")
            try:
                self.until(PROMPT, seconds=5)
            except AssertionError:
                continue
            return
        raise AssertionError(f"no prompt after Ctrl-C, but {self.unread!r}")

    def wait(self, seconds: float = 20) -> int:
        """The exit code."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            assert time.monotonic() < deadline, "it is still running"
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif select.select([self.leader], [], [], 0.05)[0]:
                try:
                    os.read(self.leader, 1 << 16)
                except OSError:
                    time.sleep(0.05)
        return self.code

    def close(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.leader)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("chat", "sampling.max_tokens=12", "sampling.seed=3", "sampling.ignore_eos=true")
    terminal.until(PROMPT)
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_a_conversation(terminal: Terminal) -> None:
    terminal.type("Hail, good sir!\n")
    assert terminal.until(RATE).groups() == ("12", "length")
    terminal.until(PROMPT)
    terminal.type("/params temperature=0 max_tokens=5\n")
    terminal.until(r"temperature=0\.0\s")
    terminal.until(r"max_tokens=5\s")
    terminal.until(PROMPT)
    terminal.type("/help\n")
    for command in ("/help", "/reset", "/params", "/exit"):
        terminal.until(command)
    terminal.until(PROMPT)

    answers = []
    for line in ("What news?", "/reset", "What news?", "What news?"):
        terminal.type(f"{line}\n")
        terminal.until(re.escape(line))
        if line != "/reset":
            answers.append(terminal.until(r"(?s)(.*)" + RATE).group(1))
        terminal.until(PROMPT)
    forgotten = answers[1]
    terminal.type("/reset\n")
    terminal.until(PROMPT)
    terminal.type("What news?\n")
    terminal.until(re.escape("What news?"))
    assert terminal.until(r"(?s)(.*)" + RATE).group(1) == forgotten  # greedy, and nothing before it
    terminal.until(PROMPT)
    terminal.type("/exit\n")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_mistakes_do_not_end_it(terminal: Terminal) -> None:
    for line, words in {
        "/rest": "There is no command '/rest'; there are: .* Did you mean '/reset'",
        "/params temprature=1": "There is no key 'temprature'. Did you mean 'temperature'",
        "/params temperature=-1": "temperature must be a number >= 0, got -1",
        "/params temperature": "'temperature' can't be read; write /params NAME=VALUE",
        "Zq" * 1900: "but max_model_len is 2048",
    }.items():
        terminal.type(f"{line}\n")
        terminal.until(words)
        terminal.until(PROMPT)
    terminal.type("Hail!\n")
    assert terminal.until(RATE).groups() == ("12", "length")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.type("/params max_tokens=null\n")
    terminal.until("max_tokens=None")
    terminal.until(PROMPT)
    terminal.type("Tell me all!\n")
    terminal.until(r"all!\s+\w+")
    terminal.type("\x03")
    number, reason = terminal.until(RATE).groups()
    assert (reason, int(number) < 1500) == ("stopped", True)
    terminal.until(PROMPT)
    terminal.type("a line that is dropped")
    terminal.until("dropped")
    terminal.interrupt()
    terminal.type("/params max_tokens=3\n")
    terminal.until("max_tokens=3")
    terminal.until(PROMPT)
    terminal.type("And then?\n")
    assert terminal.until(RATE).groups() == ("3", "length")
    terminal.until(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_a_checkpoint_without_a_chat_template(cli: Cli, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(BUNDLED, tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").unlink()
    outcome = cli("chat", f"checkpoint={checkpoint}")
    assert outcome.error == (
        f"The checkpoint {checkpoint} has no chat template, which a chat needs; use `nanoflow run`."
    )
    assert outcome.code == 1


@pytest.mark.slow
def test_what_cannot_be_used(cli: Cli) -> None:
    assert "leave out -m" in cli("chat", "-m", "engine.seed=1,2").error
    assert "n must be 1 in a chat, got 2." in cli("chat", "sampling.n=2").error
    assert "Did you mean 'system'?" in cli("chat", "sytem=x").error


def test_lines_that_are_not_typed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input from a pipe works too, and ends it."""
    lines = iter(["Hail!"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    outcome = cli("chat", "sampling.max_tokens=3", "system=Be brief.")
    assert outcome.code == 0
    assert re.search(RATE, outcome.out)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """As if a person typed these lines, and then Ctrl-D."""
    waiting = iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "  three"], "one\ntwo\n  three"),
        (['"""one', "", "two", 'three"""'], "one\n\ntwo\nthree"),
        (['"""', "one\\", '"""'], "one\\"),
        (['"""one"""'], "one"),
        (['"""one', "two"], "one\ntwo"),
        (["one\\"], "one"),
    ],
)
def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch, lines: list[str], expected: str) -> None:
    typed(monkeypatch, *lines)
    assert keyboard.message() == expected
    with pytest.raises(EOFError):
        keyboard.message()


def test_an_answer_ends_where_the_bundled_models_turn_ends(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "Who art thou?", "/params", "/params stop=[] temperature=0", "Who art thou?")
    out = cli("chat", "sampling.temperature=0", "sampling.max_tokens=200").out
    first, second = re.findall(RATE, out)
    assert first[1] == "stop"
    assert int(first[0]) < int(second[0])
    assert "stop=['\\n\\n']" in out
    assert "\n\n" not in out.partition("leaves.\n")[2].partition("\n[")[0]


def test_a_stop_string_of_ones_own_takes_its_place(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "/params", r'/params stop=["a\nb"]')
    out = cli("chat", r'sampling.stop=["\n"]').out
    assert "stop=['\\n']" in out
    assert "stop=['a\\nb']" in out


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "\n\n"),
        ("{% for m in messages %}{{ m.content }}<|endoftext|>\n\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_end_of_a_turn_is_the_templates(template: str, expected: str | None) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.hf.chat_template = template
    assert end_of_turn(tokenizer) == expected


@pytest.mark.slow
def test_the_history_outlives_the_session(tmp_path: Path) -> None:
    for keys in ("/params top_k=7\n", "\x1b[A\x1b[A\n"):  # the last line is /exit
        terminal = Terminal("chat", "sampling.max_tokens=2", state=str(tmp_path))
        try:
            terminal.until(PROMPT)
            terminal.type(keys)
            terminal.until(r"\ntop_k=7")
            terminal.until(PROMPT)
            terminal.type("/exit\n")
            assert terminal.wait() == 0
        finally:
            terminal.close()
    assert (tmp_path / "nanoflow" / "chat_history").stat().st_mode & 0o077 == 0
