"""The output file: whose it is, and what happens to it while a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.run import job, view
from nanoflow.cli.run.records_file import opened
from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from tests.cli.conftest import Cli

SHORT = ("sampling.max_tokens=3", "scheduler.max_num_seqs=8")
RUN = [sys.executable, "-m", "nanoflow", "run", "prompts_file=in.txt", "output=out.jsonl", "scheduler.max_num_seqs=8"]
LINES = 3000


def prompts(*texts: str) -> Iterator[GivenPrompt]:
    return (GivenPrompt({"prompt": text}, SamplingParams()) for text in texts)


def record(text: str) -> bytes:
    return json.dumps({"prompt": text}).encode() + b"\n"


def started(**options: object) -> subprocess.Popen:
    """A run over many prompts, once it has written some."""
    Path("in.txt").write_text("\n".join(f"{number}: shall I" for number in range(LINES)))
    process = subprocess.Popen([*RUN, "sampling.max_tokens=8"], **options)
    deadline = time.monotonic() + 120
    while not Path("out.jsonl").exists() or Path("out.jsonl").stat().st_size < 3000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_file_that_goes_away_is_told(tmp_path: Path, how: str) -> None:
    path = tmp_path / "out.jsonl"

    def go_away() -> None:
        path.unlink() if how == "removed" else path.rename(tmp_path / "old")
        if how == "replaced":
            path.write_text("")

    def write(*later: str) -> None:
        with opened(path) as file:
            file.write(record("a"))
            go_away()
            for text in later:
                file.write(record(text))

    for later in ((), ("b",)):
        with pytest.raises(ConfigError, match=r"was removed, renamed or replaced .* its 1 completions with it"):
            write(*later)
        path.unlink(missing_ok=True)


def test_a_second_run_with_one_file_is_refused(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path) as file:
        file.write(record("a"))
        outcome = cli("run", "prompts=[a]", f"output={path}", *SHORT)
        assert "is being written by another run" in outcome.error
        assert outcome.code == 1
    assert path.read_bytes() == record("a")


def test_another_writer_is_noticed_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    path = tmp_path / "out.jsonl"
    with opened(path) as mine, opened(path) as other:
        mine.write(record("a"))
        other.skip_done(prompts("a"))
        mine.write(record("b"))
        with pytest.raises(ConfigError, match="by another program"):
            other.write(record("b"))
        with path.open("ab") as third:
            third.write(b"c")
        with pytest.raises(ConfigError, match="by another program"):
            mine.write(record("c"))
    assert path.read_bytes() == record("a") + record("b") + b"c"


@pytest.mark.parametrize("tail", [b"", b'{"pro', b'{"prompt": "b", "te'])
def test_zeros_that_a_power_failure_left_are_an_unfinished_line(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(record("a") + tail + bytes(5000))
    with opened(path) as file:
        (waiting,) = file.skip_done(prompts("a", "b"))
        assert waiting.prompt == {"prompt": "b"}
        file.write(record("b"))
    assert path.read_bytes() == record("a") + record("b")


def test_a_file_without_a_line_is_removed_and_one_that_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path):
        pass
    assert not path.exists()
    path.write_bytes(b"")
    with opened(path):
        pass
    assert path.exists()


@pytest.mark.parametrize("name", ["/dev/full", "/dev/zero", "/dev/null", "fifo", "x" * 300, "a\0b"])
def test_what_is_no_file(cli: Cli, name: str) -> None:
    os.mkfifo("fifo")
    outcome = cli("run", f'output="{name}"', "prompts=[a]", *SHORT)
    assert "output" in outcome.error
    assert outcome.code == 1


@pytest.mark.parametrize("output", ["in.jsonl", "./in.jsonl", "link.jsonl"])
def test_the_prompts_file_as_output(cli: Cli, output: str) -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    Path("link.jsonl").symlink_to("in.jsonl")
    assert "is the prompts_file" in cli("run", "prompts_file=in.jsonl", f"output={output}", *SHORT).error
    assert Path("in.jsonl").read_text() == '{"prompt": "a"}\n'


@pytest.mark.slow
def test_ctrl_c_says_how_far_it_got_and_how_to_go_on(cli: Cli) -> None:
    process = started(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    num_lines = len(Path("out.jsonl").read_bytes().splitlines())
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        f"Stopped: {num_lines} of {LINES} prompts are in out.jsonl; run the same command again to go on."
    )


@pytest.mark.slow
def test_progress_on_a_terminal(cli: Cli) -> None:
    leader, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = started(stdout=subprocess.DEVNULL, stderr=screen)
    os.close(screen)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    shown = b""
    try:
        while piece := os.read(leader, 1 << 16):
            shown += piece
    except OSError:  # the other side has closed it
        pass
    os.close(leader)
    process.wait(timeout=60)
    assert f"/{LINES} [" in shown.decode()  # the time that it took, and the time that is left
    assert "tok/s" in shown.decode()


def test_an_interrupted_run_keeps_the_exception(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_building", stop)
    outcome = cli("run", "prompts=[a,b]", "output=out.jsonl")
    assert outcome.code == 130
    assert outcome.err == "Stopped: 0 of 2 prompts are in out.jsonl; run the same command again to go on.\n"
    assert view.Viewer().interrupted(0, tmp_path) is None
