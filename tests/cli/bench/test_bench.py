"""`nanoflow bench`: what it measures, prints and writes."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoflow.cli.bench.command import COMMANDS
from nanoflow.cli.settings.commands import LatencyConfig, ThroughputConfig
from nanoflow.cli.settings.schema import all_keys, sections
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES
from tests.cli.conftest import Cli

ROUNDS = ("bench.repeats=2", "bench.output=out.json")
REQUESTS = ("bench.num_prompts=3", "bench.min_input_len=5", "bench.max_input_len=20", "bench.min_output_len=4",
            "bench.max_output_len=6")  # fmt: skip


def throughput(cli: Cli, *overrides: str) -> tuple[str, dict[str, Any]]:
    """What a small `bench throughput` printed, and what it wrote."""
    return measured(cli, "throughput", *REQUESTS, *overrides)


def measured(cli: Cli, command: str, *overrides: str) -> tuple[str, dict[str, Any]]:
    outcome = cli("bench", command, *ROUNDS, *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out, json.loads(Path("out.json").read_text())


# Throughput


@pytest.mark.slow
def test_offline256_at_a_small_size(cli: Cli) -> None:
    out, record = throughput(cli)
    (result,) = record["results"]
    assert (result["name"], result["unit"], result["requests"]) == ("offline256", "tok/s", 3)
    assert len(result["values"]) == len(result["seconds"]) == 2
    assert result["min"] <= result["median"] <= result["max"]
    assert result["values"][0] == pytest.approx(result["output_tokens"] / result["seconds"][0])
    assert result["cached_prompt_tokens"] == 0, "rounds share no prefix"
    assert list(result["floor"]["parts"]) == ["attention", "linear", "head", "prefill"]
    parts = sum(part["seconds"] for part in result["floor"]["parts"].values())
    assert parts == pytest.approx(result["floor"]["seconds"])
    assert "idle" not in result
    assert (record["checkpoint"], record["model"], record["scheduler"]) == ("bard", "qwen3", "fcfs")
    assert record["speed"]["bandwidth"] > 1e8
    assert record["speed"]["flops"] > 1e8
    assert "bard | model=qwen3 attention=torch" in out
    assert "The device reads " in out
    for word in ("attention", "linear", "head", "prefill", "total", "% of floor", f"{result['output_tokens']}"):
        assert word in out


@pytest.mark.slow
def test_random_requests(cli: Cli) -> None:
    _, record = throughput(cli, "bench.workload=random", "bench.min_output_len=6", "bench.seed=3")
    (result,) = record["results"]
    assert (result["name"], result["output_tokens"]) == ("random", 18)
    assert 15 <= result["prompt_tokens"] <= 60


@pytest.mark.slow
def test_requests_from_a_file(cli: Cli) -> None:
    lines = [{"prompt": "To be, or not", "max_tokens": 5}, {"prompt_token_ids": [5, 6, 7]}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, record = measured(
        cli, "throughput", "bench.workload=file", "prompts_file=in.jsonl", "sampling.max_tokens=3", "bench.warmup=0"
    )
    (result,) = record["results"]
    assert (result["name"], result["requests"], result["output_tokens"]) == ("file", 2, 8)


@pytest.mark.slow
def test_a_profile(cli: Cli) -> None:
    out, record = throughput(
        cli,
        "bench.profile=trace.json.gz",
        "bench.profile_steps=2",
        "bench.min_output_len=20",
        "bench.max_output_len=20",
    )
    events = json.loads(gzip.decompress(Path("trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "cpu_op" for event in events)
    assert "in the profile" in out
    assert all(kernel["seconds"] > 0 and kernel["calls"] > 0 for kernel in record["kernels"])
    times = [kernel["seconds"] for kernel in record["kernels"]]
    assert times == sorted(times, reverse=True)


@pytest.mark.slow
def test_a_sweep(cli: Cli) -> None:
    outcome = cli("bench", "throughput", "-m", "engine.block_size=16,0", "bench.repeats=1", *REQUESTS)
    assert outcome.code == 1
    (folder,) = Path("runs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert (good["status"], bad["status"]) == ("ok", "failed")
    assert float(good["offline256_tok_per_s"]) > 0
    assert float(good["offline256_floor_percent"]) > 0
    head, _, first, second = (folder / "results.txt").read_text().splitlines()
    assert [cell.strip() for cell in head.split("|")] == [
        "job",
        "overrides",
        "status",
        "offline256 tok/s",
        "% of floor",
        "error",
    ]
    assert "engine.block_size=16" in first
    assert "engine.block_size must be" in second
    assert "failed" in second
    assert "offline256 " in outcome.out


@pytest.mark.slow
def test_outputs_of_a_sweep_go_to_the_folders_of_its_jobs(cli: Cli) -> None:
    overrides = ("bench.batch_sizes=[1],[2]", "bench.output_len=3", "bench.input_len=4", "bench.repeats=1")
    assert cli("bench", "latency", "-m", "bench.output=out.json", *overrides).code == 0
    (folder,) = Path("runs").iterdir()
    names = [json.loads((folder / job / "out.json").read_text())["results"][0]["name"] for job in "01"]
    assert names == ["decode-1", "decode-2"]


# Latency


@pytest.mark.slow
def test_decode(cli: Cli) -> None:
    out, record = measured(cli, "latency", "bench.batch_sizes=[1,3]", "bench.output_len=9", "bench.input_len=6")
    assert [(result["name"], result["unit"]) for result in record["results"]] == [
        ("decode-1", "ms"),
        ("decode-3", "ms"),
    ]
    for result in record["results"]:
        assert result["values"] == [pytest.approx(1000 * seconds) for seconds in result["seconds"]]
        assert result["floor"]["parts"]["prefill"]["bytes"] == 0
    assert "prefill" not in out, "decoding has no such part"


@pytest.mark.slow
def test_time_to_first_token(cli: Cli) -> None:
    _, record = measured(cli, "latency", "bench.workload=ttft-128", "bench.profile=t.json", "bench.profile_steps=1")
    (result,) = record["results"]
    assert (result["name"], result["unit"]) == ("ttft-128", "ms")
    assert result["floor"]["parts"]["attention"]["bytes"] == 0
    assert record["kernels"]
    assert json.loads(Path("t.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_start(cli: Cli) -> None:
    out, record = measured(
        cli, "latency", "bench.workload=start", "bench.warmup=0", "bench.repeats=1", "block_manager=plain"
    )
    (result,) = record["results"]
    phases = [result["imports_s"], result["engine_s"], result["first_token_s"]]
    assert sum(phases) == pytest.approx(result["median"])
    assert min(phases) > 0
    assert "block_manager=plain" in out


@pytest.mark.slow
def test_a_start_that_fails_says_why(cli: Cli) -> None:
    outcome = cli("bench", "latency", "bench.workload=start", "engine.max_model_len=99999999")
    assert outcome.code == 1
    assert "generate a token failed: engine.max_model_len is 99999999, but" in outcome.error


# Help and errors


@pytest.mark.parametrize("schema", [ThroughputConfig, LatencyConfig])
def test_help_has_every_key(cli: Cli, schema: type[ThroughputConfig | LatencyConfig]) -> None:
    command = schema.__name__.removesuffix("Config").lower()
    outcome = cli("bench", command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: nanoflow bench {command} ")
    assert "bench.yaml" in outcome.out
    for key in all_keys(Registry.load(), schema):
        if key not in (*sections(schema), *ROLES):
            assert f"\n  {key}=" in outcome.out, key
    assert f"bench.workload={schema().bench.workload} " in outcome.out
    assert "sampling.temperature=0.6 " in outcome.out


@pytest.mark.parametrize("argv", [(), ("--help",)])
def test_help_names_every_subcommand(cli: Cli, argv: tuple[str, ...]) -> None:
    outcome = cli("bench", *argv)
    assert outcome.code == 0
    assert all(f"  {name} " in outcome.out for name in COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], ["throughput", "--help"], ["latency", "--cfg", "job"]])
def test_what_needs_no_engine_imports_no_torch(argv: list[str]) -> None:
    code = f"from nanoflow.cli.main import main; main(['bench', *{argv!r}]); import sys; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.endswith("\nFalse\n")


def test_an_unknown_subcommand(cli: Cli) -> None:
    outcome = cli("bench", "latencey")
    assert outcome.code == 2
    assert (
        "There is no command 'bench latencey'; there are: throughput, latency, serving. Did you mean 'latency'?"
        in outcome.error
    )


ERRORS = {
    ("throughput", "bench.workload=offline265"): "bench.workload must be one of offline256, random, file, got "
    "'offline265'. Did you mean 'offline256'?",
    ("throughput", "bench.num_prompts=0"): "bench.num_prompts must be an integer >= 1, got 0.",
    ("throughput", "bench.repeats=0"): "bench.repeats must be an integer >= 1, got 0.",
    ("throughput", "bench.warmup=-1"): "bench.warmup must be an integer >= 0, got -1.",
    ("throughput", "bench.max_input_len=10"): "bench.max_input_len must be an integer >= min_input_len (100), got 10.",
    ("throughput", "bench.num_promts=1"): "There is no key 'bench.num_promts'. Did you mean 'bench.num_prompts'?",
    ("throughput", "bench.batch_sizes=[1]"): "There is no key 'bench.batch_sizes'",
    ("throughput", "bench.workload=file"): "bench.workload=file and prompts_file=FILE need each other",
    ("throughput", "prompts_file=in.txt"): "bench.workload=file and prompts_file=FILE need each other",
    ("throughput", "bench.output=no/where.json"): "bench.output no/where.json can't be written",
    ("throughput", "bench.profile=."): "bench.profile . can't be written",
    ("throughput", "--frobnicate"): "`nanoflow bench throughput --help` lists the flags.",
    ("latency", "bench.workload=decoed"): "Did you mean 'decode'?",
    ("latency", "bench.batch_sizes=[0]"): "bench.batch_sizes must be a list of integers >= 1, got [0].",
    ("latency", "bench.batch_sizes=8"): "write bench.batch_sizes=[...]",
    ("latency", "bench.batch_sizes=[999]"): "decode-999 needs scheduler.max_num_seqs=999 or more, got 256.",
    ("latency", "bench.output_len=1"): "bench.output_len must be an integer >= 2, got 1.",
    ("latency", "checkpoint=qwen3-0.6b"): "to run without weights set engine.load_format=dummy",
}


@pytest.mark.parametrize(("command", "argument"), ERRORS)
def test_what_cannot_be_measured(cli: Cli, command: str, argument: str) -> None:
    outcome = cli("bench", command, argument)
    assert ERRORS[command, argument] in outcome.error
    assert outcome.code == (2 if argument.startswith("--") else 1)
    assert list(Path().iterdir()) == []
