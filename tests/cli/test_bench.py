"""`nanoflow bench`: what it measures, prints and writes, and the arithmetic behind it."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoflow.bench import floor, trace, workloads
from nanoflow.bench.floor import Dims, Speed, Work
from nanoflow.bench.options import LatencyOptions, ThroughputOptions
from nanoflow.bench.results import Floor, Result
from nanoflow.cli.bench import COMMANDS
from nanoflow.cli.bench.settings import LatencyConfig, ThroughputConfig
from nanoflow.cli.settings import all_keys, sections
from nanoflow.core.config.errors import CheckpointError, ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.loading import hub
from nanoflow.core.registry.registry import Registry
from nanoflow.core.registry.roles import ROLES
from tests.cli.conftest import Cli
from tests.core.sentences import raises_sentence

ROUNDS = ("bench.repeats=2", "bench.output=out.json")
REQUESTS = ("bench.num_prompts=3", "bench.min_input_len=5", "bench.max_input_len=20", "bench.min_output_len=4",
            "bench.max_output_len=6")  # fmt: skip
SAMPLING = SamplingParams(temperature=0.6, ignore_eos=True)


def throughput(cli: Cli, *overrides: str) -> tuple[str, dict[str, Any]]:
    """What a small `bench throughput` printed, and what it wrote."""
    return measured(cli, "throughput", *REQUESTS, *overrides)


def measured(cli: Cli, command: str, *overrides: str) -> tuple[str, dict[str, Any]]:
    outcome = cli("bench", command, *ROUNDS, *overrides)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out, json.loads(Path("out.json").read_text())


def qwen3(size: str) -> dict[str, Any]:
    return hub.read_config(hub.resolve(f"qwen3-{size}"))


# Throughput


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


def test_random_requests(cli: Cli) -> None:
    _, record = throughput(cli, "bench.workload=random", "bench.min_output_len=6", "bench.seed=3")
    (result,) = record["results"]
    assert (result["name"], result["output_tokens"]) == ("random", 18)
    assert 15 <= result["prompt_tokens"] <= 60


def test_requests_from_a_file(cli: Cli) -> None:
    lines = [{"prompt": "To be, or not", "max_tokens": 5}, {"prompt_token_ids": [5, 6, 7]}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, record = measured(
        cli, "throughput", "bench.workload=file", "prompts_file=in.jsonl", "sampling.max_tokens=3", "bench.warmup=0"
    )
    (result,) = record["results"]
    assert (result["name"], result["requests"], result["output_tokens"]) == ("file", 2, 8)


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
    ]
    assert "engine.block_size=16" in first
    assert "failed" in second
    assert "offline256 " in outcome.out


def test_outputs_of_a_sweep_go_to_the_folders_of_its_jobs(cli: Cli) -> None:
    overrides = ("bench.batch_sizes=[1],[2]", "bench.output_len=3", "bench.input_len=4", "bench.repeats=1")
    assert cli("bench", "latency", "-m", "bench.output=out.json", *overrides).code == 0
    (folder,) = Path("runs").iterdir()
    names = [json.loads((folder / job / "out.json").read_text())["results"][0]["name"] for job in "01"]
    assert names == ["decode-1", "decode-2"]


# Latency


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


def test_time_to_first_token(cli: Cli) -> None:
    _, record = measured(cli, "latency", "bench.workload=ttft-128", "bench.profile=t.json", "bench.profile_steps=1")
    (result,) = record["results"]
    assert (result["name"], result["unit"]) == ("ttft-128", "ms")
    assert result["floor"]["parts"]["attention"]["bytes"] == 0
    assert record["kernels"]
    assert json.loads(Path("t.json").read_text())["traceEvents"]


def test_start(cli: Cli) -> None:
    out, record = measured(
        cli, "latency", "bench.workload=start", "bench.warmup=0", "bench.repeats=1", "block_manager=plain"
    )
    (result,) = record["results"]
    phases = [result["imports_s"], result["engine_s"], result["first_token_s"]]
    assert sum(phases) == pytest.approx(result["median"])
    assert min(phases) > 0
    assert "block_manager=plain" in out


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
    code = f"from nanoflow.cli import main; main(['bench', *{argv!r}]); import sys; print('torch' in sys.modules)"
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


def test_a_start_has_no_profile() -> None:
    with raises_sentence(ConfigError, "profile must be null for the workload start"):
        LatencyOptions(workload="start", profile="trace.json")


# Workloads


def test_offline256_is_that_of_nano_vllm() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    workload = workloads.offline256(ThroughputOptions(), SAMPLING, 151936)
    assert workload.prompts == prompts
    assert [params.max_tokens for params in workload.params] == lengths
    assert sum(map(len, workload.prompts)) == 142_827
    assert sum(params.max_tokens for params in workload.params) == 133_966
    assert all(params.temperature == 0.6 and params.ignore_eos for params in workload.params)
    assert workload.round(2)[5] == [(token_id + 74) % 10000 for token_id in prompts[5]]


def test_ids_stay_within_a_small_vocabulary() -> None:
    options = ThroughputOptions(num_prompts=4, max_input_len=200)
    small, large = (workloads.offline256(options, SAMPLING, vocab_size) for vocab_size in (2048, 151936))
    assert small.round(1) == [[token_id % 2048 for token_id in prompt] for prompt in large.round(1)]


def test_more_random_requests_extend_the_same_list() -> None:
    few, more = (workloads.uniform(ThroughputOptions(num_prompts=count, seed=5), SAMPLING, 151936) for count in (2, 4))
    assert more.prompts[:2] == few.prompts
    assert more.params[:2] == few.params


# The floor


def test_the_floor_of_a_decode_step_of_qwen3_0_6b() -> None:
    dims = Dims.from_config(qwen3("0.6b"), element=2)
    assert dims is not None
    assert dims.linear * 2 == 880_803_840  # 28 x (1024 x 4096 + 2048 x 1024 + 3 x 1024 x 3072) x 2 bytes
    assert dims.head * 2 == 311_164_928  # 151936 x 1024 x 2 bytes
    assert dims.kv_bytes_per_token == 114_688  # 28 layers x 2 x 8 heads x 128 x 2 bytes
    parts = floor.decode_step(dims, batch_size=8, input_len=128, output_len=513)
    assert parts["linear"].bytes == 880_803_840
    assert parts["head"].bytes == 311_164_928
    assert parts["attention"].bytes == 8 * 384.5 * 114_688  # contexts of 129 to 640 tokens
    assert parts["linear"].flops == 8 * 2 * 440_401_920
    assert parts["prefill"] == Work(0, 0)


def test_the_floor_of_offline256_on_qwen3_0_6b() -> None:
    dims = Dims.from_config(qwen3("0.6b"), element=2)
    workload = workloads.offline256(ThroughputOptions(), SAMPLING, 151936)
    lengths = [
        (len(prompt), params.max_tokens) for prompt, params in zip(workload.prompts, workload.params, strict=True)
    ]
    parts = Floor(floor.work(dims, lengths, 256), Speed(bandwidth=3.35e12, flops=790e12)).parts
    assert parts["attention"] == pytest.approx(4.135, abs=1e-3)
    assert parts["linear"] == pytest.approx(1023 * 880_803_840 / 3.35e12)
    assert parts["head"] == pytest.approx(1024 * 311_164_928 / 3.35e12)
    assert parts["prefill"] == pytest.approx(0.1735, abs=1e-3)


def test_the_floor_of_a_mixture_of_experts() -> None:
    """Of Qwen3-30B-A3B: 128 experts in 48 layers, of which a token takes 8."""
    dims = Dims.from_config(qwen3("30b-a3b"), element=2)
    assert dims is not None
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    assert (dims.linear, dims.expert) == (48 * (attention + 2048 * 128), 48 * 3 * 2048 * 768)
    assert dims.active == dims.linear + 8 * dims.expert
    assert dims.read(1) == pytest.approx(dims.active)
    assert dims.read(10**6) == dims.linear + 128 * dims.expert
    hit = 128 * (1 - (120 / 128) ** 64)
    parts = floor.decode_step(dims, batch_size=64, input_len=100, output_len=11)
    assert parts["linear"].bytes == pytest.approx(2 * (dims.linear + hit * dims.expert))
    assert parts["linear"].flops == 64 * 2 * dims.active
    (alone,) = {floor.decode_step(dims, 1, 100, length)["linear"].bytes for length in (2, 11)}
    assert alone == pytest.approx(2 * dims.active)


@pytest.mark.parametrize(("lengths", "sizes"), [([9, 9], [2] * 8), ([9, 5], [2] * 4 + [1] * 4), ([9, 1], [1] * 8)])
def test_the_fewest_experts_that_decodes_read(lengths: list[int], sizes: list[int]) -> None:
    dims = Dims(linear=10, head=1, query=1, kv=1, element=1, expert=4, num_experts=8, num_chosen=2)
    for max_num_seqs in (2, 5):
        found = floor.work(dims, [(5, length) for length in lengths], max_num_seqs)["linear"].bytes
        assert found <= sum(map(dims.read, sizes)) + 1e-9
        assert found == pytest.approx(sum(map(dims.read, sizes))) or max_num_seqs == 5
    assert floor.work(dims, [(5, 1)], 4)["linear"].bytes == 0


def test_fewer_sequences_at_a_time_need_more_steps() -> None:
    dims = Dims(linear=10, head=1, query=1, kv=1, element=1)
    assert floor.work(dims, [(5, 9)] * 4, 4)["linear"].bytes == 8 * 10
    assert floor.work(dims, [(5, 9)] * 4, 2)["linear"].bytes == 16 * 10


def test_work_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    speed = Speed(bandwidth=10, flops=100)
    assert Work(bytes=20, flops=100).seconds(speed) == 2
    assert Work(bytes=20, flops=300).seconds(speed) == 3


def test_the_share_of_the_floor() -> None:
    known = Floor({"linear": Work(bytes=10), "head": Work(bytes=5)}, Speed(bandwidth=10, flops=1))
    result = Result("decode-1", "ms", [2.0, 3.0, 9.0], floor=known)
    assert (result.median, result.reached) == (3000, 50)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 4},
        {**qwen3("8b"), "num_experts": 8},
        {**qwen3("8b"), "use_sliding_window": True, "sliding_window": 9},
    ],
)
def test_the_floor_of_another_kind_of_model_is_not_known(config: dict[str, Any]) -> None:
    assert Dims.from_config(config, 2) is None


# Shipped configs


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.6b", 0.6), ("1.7b", 1.7), ("4b", 4.0), ("8b", 8.2), ("14b", 14.8), ("30b-a3b", 30.5), ("32b", 32.8)],
)
def test_shipped_configs_have_the_sizes_of_their_names(size: str, billions: float) -> None:
    from transformers import AutoConfig

    config = qwen3(size)
    dims = Dims.from_config(config, 2)
    assert dims is not None
    heads = 1 if config["tie_word_embeddings"] else 2
    assert dims.read(10**9) + dims.head * heads == pytest.approx(billions * 1e9, rel=0.02)
    theirs = AutoConfig.from_pretrained(hub.resolve(f"qwen3-{size}"))
    assert (theirs.head_dim, theirs.rope_parameters["rope_theta"]) == (128, 1_000_000)
    assert theirs.model_type == ("qwen3_moe" if size == "30b-a3b" else "qwen3")


def test_a_typo_in_a_bundled_name() -> None:
    with raises_sentence(CheckpointError, "Did you mean 'qwen3-8b'?"):
        hub.resolve("qwen3-8b!")


# Traces


def kernel(start: float, duration: float, name: str = "k", **fields: Any) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "tid": 7, **fields}


def test_idle_time_is_what_no_kernel_covers() -> None:
    events = [kernel(0, 40), kernel(30, 20), kernel(52, 8), kernel(80, 20), {"cat": "cpu_op", "ts": 0, "dur": 999}]
    found = trace.idle(events)
    assert found is not None
    assert found.share == pytest.approx(0.22)
    assert found.waiting == pytest.approx(0.20)
    assert trace.idle(events[-1:]) is None


def test_kernels_are_grouped_by_name() -> None:
    events = [kernel(0, 3, "void gemm<4>(float*)"), kernel(5, 4, "void gemm<4>(half*)"), kernel(10, 5, "add")]
    found = [(kernel.name, kernel.calls, kernel.seconds) for kernel in trace.top_kernels(events, 5)]
    assert found == [("gemm<4>", 2, pytest.approx(7e-6)), ("add", 1, pytest.approx(5e-6))]


def test_an_operator_s_own_time_is_without_that_of_those_inside() -> None:
    events = [
        kernel(start, duration, name, cat="cpu_op")
        for name, start, duration in (
            ("outer", 0, 10),
            ("inner", 1, 4),
            ("innermost", 2, 1),
            ("inner", 6, 2),
            ("next", 10, 3),
        )
    ]
    found = {kernel.name: kernel.seconds for kernel in trace.top_kernels(events, 9)}
    assert found == {name: pytest.approx(t * 1e-6) for name, t in
                     {"outer": 4, "inner": 5, "innermost": 1, "next": 3}.items()}  # fmt: skip
