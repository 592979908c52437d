"""What a line of a prompts file may be, and what its record holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanoflow import SamplingParams
from nanoflow.cli.prompt_line import MOST_LEVELS, from_json
from nanoflow.core.config.errors import ConfigError
from tests.cli.conftest import Cli, Outcome

SHORT = ("sampling.max_tokens=3", "sampling.temperature=0", "scheduler.max_num_seqs=8")
CHAT = [{"role": "user", "content": "Who art thou?"}]
BODY = {"model": "bard", "messages": CHAT}


def run(cli: Cli, *lines: Any, arguments: tuple[str, ...] = ()) -> Outcome:
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return cli("run", "prompts_file=in.jsonl", "output=out.jsonl", *SHORT, *arguments)


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def parsed(**values: Any) -> Any:
    return from_json(json.dumps(values), SamplingParams())


def test_ids_and_other_keys_are_copied_into_the_record_with_its_place(cli: Cli) -> None:
    lines = [
        {"prompt": "a", "id": 17, "tags": {"x": [1]}},
        {"prompt": "b", "custom_id": "zwei \ud800"},
        {"prompt": "c"},
    ]
    assert run(cli, *lines).code == 0
    records = read()
    assert [record["index"] for record in records] == [0, 1, 2]
    assert (records[0]["id"], records[0]["tags"], records[1]["custom_id"]) == (17, {"x": [1]}, "zwei \ud800")
    assert "3 prompts are done already" in run(cli, *lines).err


def test_conversations_and_openai_lines(cli: Cli) -> None:
    """All ways to say the same give the same tokens; a run that was cut within a line goes on."""
    openai = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": BODY | {"max_tokens": 2}}
    lines = [{"messages": CHAT, "max_tokens": 2, "id": 1}, openai, {"messages": [{"role": "nobody"}]}]
    assert run(cli, *lines).code == 0
    first, second, third = records = read()
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 2
    assert "Who art thou?" in first["prompt"]
    assert (first["messages"], first["id"]) == (CHAT, 1)
    assert [second[key] for key in ("custom_id", "method", "url")] == ["r1", "POST", "/v1/chat/completions"]
    assert third["finish_reason"] in ("error", "length")
    whole = Path("out.jsonl").read_bytes()
    for cut in (5, 40, whole.index(b"\n") + 20, len(whole) - 3):
        Path("out.jsonl").write_bytes(whole[:cut])
        assert run(cli, *lines).code == 0
        assert [record["token_ids"] for record in read()] == [record["token_ids"] for record in records]


def test_a_conversation_on_the_terminal(cli: Cli) -> None:
    Path("in.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"prompt": "b"}))
    outcome = cli("run", "prompts_file=in.jsonl", *SHORT)
    assert outcome.code == 0
    assert "Who art thou?" in outcome.out
    Path("in.jsonl").write_text(json.dumps({"messages": "Hello"}))
    assert "Prompt 0: messages must be a list" in cli("run", "prompts_file=in.jsonl", *SHORT).error


def test_a_body_in_the_words_of_openai() -> None:
    body = BODY | {
        "max_completion_tokens": 9, "stop": "END", "logprobs": True, "top_logprobs": 2, "stream": True, "seed": None,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    }  # fmt: skip
    given = parsed(custom_id="1", url="/v1/chat/completions", body=body)
    assert given.prompt == {"messages": CHAT}
    assert (given.params.max_tokens, given.params.stop, given.params.logprobs) == (9, ["END"], 2)
    assert given.params.structured_outputs.json == {"type": "object"}
    for prompt, expected in {
        "a": {"prompt": "a"},
        (5, 6): {"prompt_token_ids": [5, 6]},
        ("a",): {"prompt": "a"},
    }.items():
        assert parsed(url="/v1/completions", body={"prompt": prompt, "logprobs": 3}).prompt == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": "/v1/embeddings", "body": {}}, "its url must be /v1/chat/completions or /v1/completions"),
        ({"custom_id": 1, "body": []}, "its body must be an object"),
        ({"custom_id": 1, "body": {"messages": None}}, "its body must be an object with"),
        ({"custom_id": 1, "method": "GET", "body": BODY}, 'its method must be "POST"'),
        ({"custom_id": 1, "body": BODY | {"best_of": 2}}, "'best_of', which is not served"),
        ({"url": "/v1/completions", "body": {"prompt": ["a", "b"]}}, "several prompts"),
        ({"custom_id": 1, "body": BODY | {"response_format": "json"}}, "response_format must have one of the types"),
        ({"prompt": "a", "temprature": 1}, "Did you mean 'sampling.temperature'?"),
        ({"prompt": "a", "sampling": {"top_k": 1}}, "sampling parameters stand beside the prompt"),
        ({"prompt": "a", "text": "b"}, "the key 'text' is one of the record"),
        ({"prompt": "a", "messages": CHAT}, "an object with either"),
    ],
)
def test_a_line_that_cannot_be_used(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "id": ' + "[" * 200_000 + "]" * 200_000 + "}", f"at most {MOST_LEVELS} levels"),
        ('{"prompt": "a", "stop": ' + "[" * 500 + "]" * 500 + "}", f"at most {MOST_LEVELS} levels"),
        ('{"prompt": "a", "top_k": ' + "9" * 5000 + "}", "too many digits"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "too many digits"),
    ],
)
def test_json_without_measure(cli: Cli, line: str, words: str) -> None:
    Path("in.jsonl").write_text(line)
    assert "in.jsonl, line 1: " in (error := cli("run", "prompts_file=in.jsonl").error)
    assert words in error


def test_a_prompt_that_cannot_be_served_is_a_record_and_the_batch_goes_on(cli: Cli) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b " * 3000, "id": 4}, {"prompt": ""}, {"prompt": "\ud800"}, {"prompt": 7},
             {"prompt_token_ids": [10**9], "truncate_prompt_tokens": 1}, {"prompt_token_ids": "x"},
             {"messages": 5}, {"prompt": "z"}]  # fmt: skip
    outcome = run(cli, *lines)
    assert outcome.code == 0
    assert "7 prompts could not be served" in outcome.err
    records = read()
    assert [record["finish_reason"] for record in records] == ["length", *["error"] * 7, "length"]
    assert "max_model_len" in records[1]["stop_reason"]
    assert (records[1]["id"], records[1]["index"], records[1]["token_ids"]) == (4, 1, [])
    assert "9 prompts are done already" in run(cli, *lines).err
    Path("out.jsonl").write_bytes(Path("out.jsonl").read_bytes()[:-9])
    assert run(cli, *lines).code == 0
    assert [record["token_ids"] for record in read()] == [record["token_ids"] for record in records]


def test_stop_and_record_can_be_asked_for(cli: Cli) -> None:
    assert "Prompt 1" in run(cli, {"prompt": "a"}, {"prompt": ""}, arguments=("on_error=stop",)).error
    assert "Prompt 1" in cli("run", 'prompts=["a", ""]', "output=o.jsonl", *SHORT).error
    assert cli("run", 'prompts=["a", ""]', "output=p.jsonl", "on_error=record", *SHORT).code == 0
    assert "write output=FILE" in cli("run", "on_error=record").error
    assert "on_error must be record, stop or null, got 'skip'" in cli("run", "on_error=skip").error


def test_log_probabilities_are_in_the_record(cli: Cli) -> None:
    assert (
        run(cli, {"prompt": "a b", "logprobs": 2, "prompt_logprobs": 0}, {"prompt": "a", "n": 2, "logprobs": 0}).code
        == 0
    )
    first, second = read()
    assert [token_id in map(int, found) for token_id, found in zip(first["token_ids"], first["logprobs"], strict=True)]
    sure = [found[str(token_id)] for token_id, found in zip(first["token_ids"], first["logprobs"], strict=True)]
    assert sum(token["logprob"] for token in sure) == pytest.approx(first["cumulative_logprob"])
    assert sure[0]["rank"] == 1
    assert "".join(token["decoded_token"] for token in sure) == first["text"]
    assert first["prompt_logprobs"][0] is None
    assert len(first["prompt_logprobs"]) == first["num_prompt_tokens"]
    assert all("logprobs" in completion for completion in second["completions"])


def test_a_byte_order_mark_is_no_part_of_a_prompt(cli: Cli) -> None:
    for name, content in {"in.txt": "\ufeffHAMLET:\n", "in.jsonl": '\ufeff{"prompt": "HAMLET:"}\n'}.items():
        Path(name).write_text(content, encoding="utf-8")
        assert cli("run", f"prompts_file={name}", f"output={name}.out", *SHORT).code == 0
        assert json.loads(Path(f"{name}.out").read_text())["prompt"] == "HAMLET:"
    Path("in.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    assert "at byte 5" in cli("run", "prompts_file=in.txt", *SHORT).error


def test_the_documented_lines_and_keys(cli: Cli) -> None:
    """The lines of docs/batch.md are served, and it names every key of their records."""
    text = (Path(__file__).parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")
    Path("in.jsonl").write_text(text.partition("```json\n")[2].partition("```")[0])
    outcome = cli("run", "prompts_file=in.jsonl", "output=out.jsonl")
    assert (outcome.code, outcome.err) == (0, "")
    records = read()
    assert [record["finish_reason"] for record in records] == ["stop", "length", "length"]
    of_records = text.partition("## Records")[2].partition("##")[0]
    own = ("id", "custom_id", "method", "url")
    assert all(f"`{key}`" in of_records for record in records for key in record if key not in own)


def test_log_probabilities_on_the_terminal(cli: Cli) -> None:
    outcome = cli("run", "prompts=Hello", "sampling.logprobs=0", *SHORT)
    assert re.search(r"3 tokens, length, log-probability -\d+\.\d\d ---", outcome.out)
    assert "log-probability" not in cli("run", "prompts=Hello", *SHORT).out


def test_prompts_that_a_file_takes_the_place_of(cli: Cli) -> None:
    Path("in.txt").write_text("a\n")
    assert "prompts is not used" in cli("run", "prompts_file=in.txt", "prompts=Hello", *SHORT).err
    assert cli("run", "prompts_file=in.txt", *SHORT).err == ""
