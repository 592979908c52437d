"""`nanoflow run` with an output file: any number of prompts, bounded memory, and going on where it was stopped."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.prompt_line import GivenPrompt
from nanoflow.cli.run import batch, records
from tests.cli.conftest import Cli
from tests.core.running import engine_of, greedy
from tests.core.scripted import scripted_llm

SHORT = ("sampling.max_tokens=3", "scheduler.max_num_seqs=32")


def read(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def same(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a run that was stopped in between has in common with one that was not."""
    return [(record["prompt"], record["token_ids"], record["text"]) for record in records]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.slow
def test_prompts_from_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "To be,\n\nO Roméo\r\n".encode())
    outcome = cli("run", "prompts_file=-", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    assert "--- 2/2: " in outcome.out
    stdin(monkeypatch, "To be,\n\nO Roméo\r\n".encode())
    assert cli("run", "prompts_file=-", "output=out.jsonl", *SHORT).code == 0
    assert [record["prompt"] for record in read()] == ["To be,", "O Roméo"]


@pytest.mark.slow
@pytest.mark.parametrize(("content", "words"), [(b"", "Standard input holds no prompt"), (b"a\xff", "is not UTF-8")])
def test_standard_input_that_cannot_be_used(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    for arguments in ((), ("output=out.jsonl",)):
        stdin(monkeypatch, content)
        assert words in cli("run", "prompts_file=-", *arguments, *SHORT).error


@pytest.mark.slow
def test_going_on_after_a_kill(cli: Cli) -> None:
    """What is there stays, a line that was not finished is made again, and seeds are those of a run in one go."""
    lines = [f"{index}: shall I compare thee" for index in range(1000)]
    Path("in.txt").write_text("\n".join(lines))
    arguments = ["run", "prompts_file=in.txt", "output=out.jsonl", *SHORT]
    command = [sys.executable, "-m", "nanoflow", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out, deadline = Path("out.jsonl"), time.monotonic() + 60
    while not out.exists() or out.stat().st_size < 20_000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = out.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1]
    out.write_bytes(whole + b'{"prompt": "' + lines[whole.count(b"\n")].encode()[:9])
    outcome = cli(*arguments)
    assert outcome.code == 0
    assert f"{len(whole.splitlines())} prompts are done already" in outcome.err
    assert out.read_bytes().startswith(whole)
    assert [record["prompt"] for record in read()] == lines
    assert f"{1000 - len(whole.splitlines())} prompts, " in outcome.out
    assert cli("run", "prompts_file=in.txt", "output=once.jsonl", *SHORT).code == 0
    assert same(read("once.jsonl")) == same(read())
    assert "0 prompts, " in cli(*arguments).out


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("precious", 1),
        ("precious\n", 1),
        ('{"prompt": "b"', 1),
        ('{"a": 1}', 1),
        ('{"prompt": "b"}\n', 1),
        ('{"prompt": "a"}\n{"prompt": "c"}\n', 2),
        ('{"prompt": "a"}\n[]\n', 2),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n', 3),
    ],
)
def test_a_file_that_holds_something_else_is_left_alone(cli: Cli, content: str, line: int) -> None:
    Path("out.jsonl").write_text(content)
    outcome = cli("run", "prompts=[a,b]", "output=out.jsonl", *SHORT)
    assert f"its line {line} is not the completion of prompt {line}; delete the file to start over" in outcome.error
    assert (outcome.code, Path("out.jsonl").read_text()) == (1, content)


@pytest.mark.slow
def test_prompts_as_token_ids_are_known_again(cli: Cli) -> None:
    Path("in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n{"prompt": "é", "max_tokens": 1}\n')
    arguments = ("run", "prompts_file=in.jsonl", "output=out.jsonl", *SHORT)
    cli(*arguments)
    whole = Path("out.jsonl").read_bytes()
    for cut in (5, 20, whole.index(b"\n"), whole.index(b"\n") + 16, len(whole) - 1):
        Path("out.jsonl").write_bytes(whole[:cut])
        assert cli(*arguments).code == 0
        assert [(record["prompt"], len(record["token_ids"])) for record in read()] == [(None, 3), ("é", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("length", ["2", "-1"])
def test_truncated_prompts_are_known_again(cli: Cli, length: str) -> None:
    prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8]} for i in range(3)]
    Path("in.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = ("prompts_file=in.jsonl", "output=out.jsonl", f"sampling.truncate_prompt_tokens={length}", *SHORT)
    assert cli("run", *arguments, "engine.max_model_len=6").code == 0
    whole, path = read(), Path("out.jsonl")
    assert [len(record["prompt_token_ids"]) for record in whole] == [2 if length == "2" else 3] * 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:60])
    outcome = cli("run", *arguments, "engine.max_model_len=6")
    assert (outcome.code, "1 prompts are done already" in outcome.err) == (0, True)
    assert same(read()) == same(whole)
    path.write_text(lines[0].replace("[", "[9, ", 1))
    assert "its line 1 is not the completion of prompt 1" in cli("run", *arguments, "engine.max_model_len=6").error


def test_a_prompt_that_cannot_be_served(cli: Cli) -> None:
    """Those before it are kept; once it is mended, the run goes on."""
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "c"}\n')
    arguments = ("run", "prompts_file=in.jsonl", "output=out.jsonl", "on_error=stop", *SHORT)
    assert "Prompt 1: The prompt is empty" in cli(*arguments).error
    assert [record["prompt"] for record in read()] == ["a"]
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    assert cli(*arguments).code == 0
    assert [record["prompt"] for record in read()] == ["a", "b", "c"]


@pytest.mark.slow
def test_several_completions(cli: Cli) -> None:
    outcome = cli("run", "prompts=[HAMLET]", "output=out.jsonl", "sampling.n=3", "sampling.temperature=3", *SHORT)
    (record,) = read()
    assert len({tuple(completion["token_ids"]) for completion in record["completions"]}) == 3
    assert record["text"] == record["completions"][0]["text"]
    assert record["num_output_tokens"] == 9
    assert "--- 1/1 (3/3): " in outcome.out
    assert "+ 9 tokens in" in outcome.out


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Four times as many prompts take no more memory at their peak."""
    llm = scripted_llm(tmp_path / "checkpoint", [5, 6, 7], scheduler={"max_num_seqs": 32})

    def prompts(count: int) -> Iterator[GivenPrompt]:
        for index in range(count):
            yield GivenPrompt({"prompt_token_ids": [1 + index % 97] * 64}, greedy(1 + index % 3))

    def peak(count: int) -> int:
        tracemalloc.start()
        with (tmp_path / f"{count}.jsonl").open("wb") as file:
            for result in batch.completions(llm, prompts(count), max_pending=64):
                file.write(records.line(result))
                assert len(engine_of(llm).requests) <= 64
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len((tmp_path / f"{count}.jsonl").read_text().splitlines()) == count
        return most

    peak(500)
    assert peak(4000) < 1.25 * peak(1000)
    assert engine_of(llm).block_manager.num_free_blocks == engine_of(llm).block_manager.num_blocks


def test_prompts_are_read_when_there_is_room(tmp_path: Path) -> None:
    llm = scripted_llm(tmp_path / "checkpoint", [5, 6, 7])
    asked = iter(range(100))
    prompts = (GivenPrompt({"prompt_token_ids": [1 + next(asked)]}, greedy(2)) for _ in range(100))
    results = batch.completions(llm, prompts, max_pending=10)
    assert next(results).output.prompt_token_ids == [1]
    assert next(asked) <= 10
    results.close()
    assert not engine_of(llm).has_unfinished


@pytest.mark.slow
def test_a_lone_prompt_streams_to_a_terminal() -> None:
    """The text comes in pieces, while the command still runs."""
    command = [sys.executable, "-m", "nanoflow", "run", "prompts=[HAMLET]", "sampling.max_tokens=40"]
    leader, screen = pty.openpty()
    with subprocess.Popen(command, stdout=screen, stderr=subprocess.DEVNULL, env={**os.environ, "NO_COLOR": "1"}):
        os.close(screen)
        pieces = []
        try:
            while piece := os.read(leader, 1 << 16):
                pieces.append(piece)
        except OSError:  # the other side has closed it
            pass
    os.close(leader)
    shown = b"".join(pieces).decode()
    assert shown.startswith("HAMLET")
    assert "+ 40 tokens, length ---" in shown
    assert "1 prompt, " in shown
    assert len(pieces) > 10
