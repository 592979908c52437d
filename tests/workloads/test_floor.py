"""The least time that a device needs, by arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.bench.result import Floor
from nanoflow.core.config.errors import CheckpointError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.core.loading import hub, read_config
from nanoflow.workloads import floor, offline
from nanoflow.workloads.floor import Dims, Speed, Work
from nanoflow.workloads.options import ThroughputOptions
from tests.core.sentences import raises_sentence

SAMPLING = SamplingParams(temperature=0.6, ignore_eos=True)


def qwen3(size: str) -> dict[str, Any]:
    return read_config(hub.resolve(f"qwen3-{size}"))


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
    workload = offline.offline256(ThroughputOptions(), SAMPLING, 151936)
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
