"""`nanoflow run`: what it prints, reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SHORT = ("sampling.max_tokens=3", "sampling.temperature=0")


@pytest.mark.slow
def test_each_prompt_is_printed_with_its_completion_and_what_ran(cli: Cli) -> None:
    outcome = cli("run", "output=out.jsonl", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records][:2] == ["HAMLET:\n", "JULIET:\nO Romeo"]
    for record in records:
        assert record["prompt"] + record["text"] in outcome.out
    *_, description, speed = outcome.out.splitlines()
    assert description.startswith("bard | model=qwen3 attention=torch scheduler=fcfs block_manager=prefix | cpu")
    assert f"{sum(r['num_prompt_tokens'] for r in records)} + 12 tokens" in speed
    for measure in ("prompt ", "output ", " tok/s", "TTFT ", "prefix-cache hits ", "preemptions 0"):
        assert measure in speed


def test_a_record_tells_all_about_its_request(cli: Cli) -> None:
    cli("run", "prompts=[HAMLET]", "output=out.jsonl", *SHORT)
    record = json.loads(Path("out.jsonl").read_text())
    assert len(record["token_ids"]) == record["num_output_tokens"] == 3
    assert len(record["prompt_token_ids"]) == record["num_prompt_tokens"]
    assert record["finish_reason"] == "length"
    assert record["ttft"] > 0
    assert record["num_cached_tokens"] == 0


def test_a_plain_run_writes_no_file(cli: Cli) -> None:
    cli("run", "prompts=[HAMLET]", *SHORT)
    assert list(Path().iterdir()) == []


def test_prompts_from_a_text_file(cli: Cli) -> None:
    Path("in.txt").write_text("To be,\n\nO Roméo\n", encoding="utf-8")
    outcome = cli("run", "prompts_file=in.txt", *SHORT)
    assert "To be," in outcome.out
    assert "O Roméo" in outcome.out
    assert "2 prompts, " in outcome.out
    assert "HAMLET" not in outcome.out


def test_prompts_from_json_lines_with_sampling_of_their_own(cli: Cli) -> None:
    lines = [{"prompt": "To be,\n", "max_tokens": 5}, {"prompt_token_ids": [5, 6, 7], "logit_bias": {"5": 100}}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = cli("run", "prompts_file=in.jsonl", "output=out.jsonl", *SHORT)
    assert outcome.code == 0
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [len(record["token_ids"]) for record in records] == [5, 3]
    assert records[1]["prompt"] is None
    assert records[1]["token_ids"] == [5, 5, 5]
    assert records[1]["prompt_token_ids"] == [5, 6, 7]
    assert "To be" not in outcome.out  # it stands in the file
    assert "<3 token ids>" in cli("run", "prompts_file=in.jsonl", *SHORT).out


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.txt", b"\n \n", "holds no prompt"),
        ("in.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("in.jsonl", b"{", "in.jsonl, line 1: this is not JSON"),
        ("in.jsonl", b'\n"x"', "in.jsonl, line 2: this must be an object with either"),
        ("in.jsonl", b'{"prompt": "a", "prompt_token_ids": [1]}', "line 1: this must be an object with either"),
        ("in.jsonl", b'{"prompt": "a", "max_token": 1}', "Did you mean 'sampling.max_tokens'?"),
        ("in.jsonl", b'{"prompt": "a", "top_p": 2}', "line 1: sampling.top_p must be a number in (0, 1], got 2.0."),
        ("in.jsonl", b'{"prompt": "a", "top_k": "x"}', "line 1: sampling.top_k must be an integer, got 'x'."),
        ("in.jsonl", b'{"prompt": 7}', "7"),
        ("in.jsonl", b'{"prompt_token_ids": [999999999]}', "999999999"),
    ],
)
def test_a_prompts_file_that_cannot_be_used(cli: Cli, name: str, content: bytes, expected: str) -> None:
    Path(name).write_bytes(content)
    outcome = cli("run", f"prompts_file={name}")
    assert expected in outcome.error
    assert outcome.code == 1


def test_an_output_file_outlives_a_run_that_fails(cli: Cli) -> None:
    Path("out.jsonl").write_text("precious")
    assert cli("run", "output=out.jsonl", "prompts=[a]", "engine.max_model_len=1").code == 1
    assert Path("out.jsonl").read_text() == "precious"


def test_a_prompt_that_cannot_be_served(cli: Cli) -> None:
    outcome = cli("run", 'prompts=[a, ""]')
    assert "Prompt 1" in outcome.error
    assert outcome.code == 1
