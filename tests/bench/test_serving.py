"""Requests come at their times, and each is accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow import LLM
from nanoflow.bench import serving
from nanoflow.bench.serving_report import Served, percentiles
from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.workloads.arrivals import families
from nanoflow.workloads.options import ServingOptions

SAMPLING = SamplingParams(temperature=0, ignore_eos=True)


def test_percentiles() -> None:
    served = [Served(0, 1, 2, 0, 0, ttft=i / 1000, tpot=None if i else 0.5, e2e=2.0) for i in range(101)]
    found = percentiles(served)
    assert [found[f"ttft_p{p}_ms"] for p in (50, 90, 99)] == pytest.approx([50, 90, 99])
    assert found["tpot_p50_ms"] == 500
    assert found["e2e_p99_ms"] == 2000


@pytest.mark.slow
def test_a_request_waits_from_its_arrival_on() -> None:
    """Those that come together wait for each other; the late one comes when nothing is left to do."""
    options = ServingOptions(num_prompts=4, rate=0)
    arrivals = families(options, SAMPLING, vocab_size=500)
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
    arrivals = families(options, SAMPLING, vocab_size=500)
    arrivals[1] = replace(arrivals[1], time=1000.0)
    with LLM(num_kv_blocks=64, overlap=False) as llm:
        clock = serving.Clock(2.0)
        served = serving.serve(llm.engine, arrivals, clock)
    assert [(one.ttft, one.tpot, one.e2e) for one in served] == [(2, 2, 10)] * 2
    assert clock.now == 1010
