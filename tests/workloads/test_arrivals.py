"""Requests that arrive over time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow.core.config.sampling_params import SamplingParams
from nanoflow.workloads import arrivals as workloads
from nanoflow.workloads.options import ServingOptions

SAMPLING = SamplingParams(temperature=0, ignore_eos=True)


def test_the_trace_is_made_of_families() -> None:
    options = ServingOptions(num_prompts=2000, rate=50, families=8, prefix_len=20, priorities=3)
    arrivals = workloads.families(options, SAMPLING, vocab_size=500)
    assert arrivals == workloads.families(options, SAMPLING, vocab_size=500)
    assert arrivals != workloads.families(replace(options, seed=1), SAMPLING, vocab_size=500)
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
