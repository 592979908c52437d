"""`nanoflow bench serving`: requests come at their times, and each is accounted for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow import LLM
from nanoflow.bench import serving
from nanoflow.bench.options import ServingOptions
from nanoflow.bench.serving import Served
from nanoflow.core.config.sampling_params import SamplingParams
from tests.cli.conftest import Cli

SMALL = ("bench.num_prompts=12", "bench.max_output_len=6", "bench.families=2", "bench.output=out.json")
SAMPLING = SamplingParams(temperature=0, ignore_eos=True)


def test_the_trace_is_made_of_families() -> None:
    options = ServingOptions(num_prompts=2000, rate=50, families=8, prefix_len=20, priorities=3)
    arrivals = serving.families(options, SAMPLING, vocab_size=500)
    assert arrivals == serving.families(options, SAMPLING, vocab_size=500)
    assert arrivals != serving.families(replace(options, seed=1), SAMPLING, vocab_size=500)
    times = [arrival.time for arrival in arrivals]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 50, rel=0.1)
    sizes = {}
    for arrival in arrivals:
        prefix = tuple(arrival.prompt[:20])
        sizes[prefix] = sizes.get(prefix, 0) + 1
    assert len(sizes) == 8
    assert max(sizes.values()) / min(sizes.values()) == pytest.approx(8, rel=0.4)
    own = [len(arrival.prompt) - 20 for arrival in arrivals]
    outputs = [arrival.params.max_tokens or 0 for arrival in arrivals]
    for lengths in (own, outputs):
        assert (min(lengths), max(lengths)) == (4, 64)
        assert sum(length <= 16 for length in lengths) == pytest.approx(1000, rel=0.1), "many are short"
    assert {arrival.params.priority for arrival in arrivals} == {0, 1, 2}
    assert all(0 <= token_id < 500 for arrival in arrivals for token_id in arrival.prompt)


def test_percentiles() -> None:
    served = [Served(0, 1, 2, 0, 0, ttft=i / 1000, tpot=None if i else 0.5, e2e=2.0) for i in range(101)]
    found = serving.percentiles(served)
    assert [found[f"ttft_p{p}_ms"] for p in (50, 90, 99)] == pytest.approx([50, 90, 99])
    assert found["tpot_p50_ms"] == 500
    assert found["e2e_p99_ms"] == 2000


def test_a_request_waits_from_its_arrival_on() -> None:
    """Those that come together wait for each other; the late one comes when nothing is left to do."""
    options = ServingOptions(num_prompts=4, rate=0)
    arrivals = serving.families(options, SAMPLING, vocab_size=500)
    arrivals[-1] = replace(arrivals[-1], time=0.7)
    with LLM(max_num_seqs=1, num_kv_blocks=64) as llm:
        clock = serving.Clock()
        served = serving.serve(llm.engine, arrivals, clock)
    assert [one.output_tokens for one in served] == [arrival.params.max_tokens for arrival in arrivals]
    assert [one.prompt_tokens for one in served] == [len(arrival.prompt) for arrival in arrivals]
    assert clock.now >= 0.7 + served[-1].e2e - 0.01
    first = served[:3]
    assert [one.ttft for one in first] == sorted(one.ttft for one in first)
    assert first[1].ttft > first[0].e2e
    for one in served:
        assert one.e2e == pytest.approx(one.ttft + (one.tpot or 0) * (one.output_tokens - 1))


def test_virtual_time() -> None:
    """A step takes as long as it is said to, and idle time passes at once: a lone request takes a step a token."""
    options = ServingOptions(num_prompts=2, rate=0, min_output_len=5, max_output_len=5)
    arrivals = serving.families(options, SAMPLING, vocab_size=500)
    arrivals[1] = replace(arrivals[1], time=1000.0)
    with LLM(num_kv_blocks=64, overlap=False) as llm:
        clock = serving.Clock(2.0)
        served = serving.serve(llm.engine, arrivals, clock)
    assert [(one.ttft, one.tpot, one.e2e) for one in served] == [(2, 2, 10)] * 2
    assert clock.now == 1010


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
