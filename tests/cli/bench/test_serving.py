"""`nanoflow bench serving`: requests come at their times, and each is accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SMALL = ("bench.num_prompts=12", "bench.max_output_len=6", "bench.families=2", "bench.output=out.json")


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0, 200])
def test_what_is_told(cli: Cli, rate: float) -> None:
    outcome = cli("bench", "serving", f"bench.rate={rate}", *SMALL, "scheduler=priority", "block_manager=radix")
    assert (outcome.code, outcome.err) == (0, "")
    assert "priority 2 | TTFT ms" in outcome.out
    record = json.loads(Path("out.json").read_text())
    assert (record["scheduler"], record["block_manager"], record["requests"]) == ("priority", "radix", 12)
    assert record["ttft_p50_ms"] <= record["ttft_p90_ms"] <= record["ttft_p99_ms"] <= record["e2e_p99_ms"]
    assert len(record["served"]) == 12
    assert record["output_tokens"] == sum(one["output_tokens"] for one in record["served"])
    assert record["hit_rate_percent"] > 0
    assert set(record["by_priority"]) <= {"0", "1", "2"}


@pytest.mark.slow
def test_requests_from_a_file(cli: Cli) -> None:
    lines = [{"prompt": "To be", "max_tokens": 3, "priority": 4}, {"prompt_token_ids": [5, 6], "priority": -1}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = cli("bench", "serving", "bench.workload=file", "prompts_file=in.jsonl", "sampling.max_tokens=2",
                  "bench.rate=100", "bench.output=out.json")  # fmt: skip
    assert outcome.code == 0
    served = json.loads(Path("out.json").read_text())["served"]
    assert [(one["priority"], one["output_tokens"]) for one in served] == [(4, 3), (-1, 2)]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("bench.workload=file", "bench.workload=file and prompts_file=FILE need each other"),
        ("bench.rate=-1", "bench.rate must be a number >= 0, got -1."),
        ("bench.step_ms=0", "bench.step_ms must be a number > 0 or null, got 0."),
        ("bench.families=0", "bench.families must be an integer >= 1, got 0."),
        ("bench.max_input_len=1", "bench.max_input_len must be an integer >= min_input_len (4), got 1."),
        ("bench.repeats=2", "There is no key 'bench.repeats'"),
        ("bench.max_output_len=9000 bench.min_output_len=9000 engine.num_kv_blocks=8", "The request needs a KV cache"),
    ],
)
def test_mistakes(cli: Cli, override: str, sentence: str) -> None:
    outcome = cli("bench", "serving", *override.split())
    assert outcome.code == 1
    assert sentence in outcome.error
