"""Requests that are handed over at once, and options of workloads."""

from __future__ import annotations

import random

from nanoflow.core.config.errors import ConfigError
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.workloads import offline
from nanoflow.workloads.options import LatencyOptions, ThroughputOptions
from tests.core.sentences import raises_sentence

SAMPLING = SamplingParams(temperature=0.6, ignore_eos=True)


def test_a_start_has_no_profile() -> None:
    with raises_sentence(ConfigError, "profile must be null for the workload start"):
        LatencyOptions(workload="start", profile="trace.json")


def test_offline256_is_that_of_nano_vllm() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    workload = offline.offline256(ThroughputOptions(), SAMPLING, 151936)
    assert workload.prompts == prompts
    assert [params.max_tokens for params in workload.params] == lengths
    assert sum(map(len, workload.prompts)) == 142_827
    assert sum(params.max_tokens for params in workload.params) == 133_966
    assert all(params.temperature == 0.6 and params.ignore_eos for params in workload.params)
    assert workload.round(2)[5] == [(token_id + 74) % 10000 for token_id in prompts[5]]


def test_ids_stay_within_a_small_vocabulary() -> None:
    options = ThroughputOptions(num_prompts=4, max_input_len=200)
    small, large = (offline.offline256(options, SAMPLING, vocab_size) for vocab_size in (2048, 151936))
    assert small.round(1) == [[token_id % 2048 for token_id in prompt] for prompt in large.round(1)]


def test_more_random_requests_extend_the_same_list() -> None:
    few, more = (offline.uniform(ThroughputOptions(num_prompts=count, seed=5), SAMPLING, 151936) for count in (2, 4))
    assert more.prompts[:2] == few.prompts
    assert more.params[:2] == few.params


def test_a_workload_is_found_by_the_name_of_its_result() -> None:
    shapes = {name: offline.named(name, SAMPLING, 500).shape for name in ("decode-8", "ttft-128")}
    assert shapes == {"decode-8": (8, 128, 513), "ttft-128": (1, 128, 1)}
    assert offline.named("offline256", SAMPLING, 500) == offline.offline256(ThroughputOptions(), SAMPLING, 500)
