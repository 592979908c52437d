"""Slots of the runner's buffers, the engine's counters, and the outputs' metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoflow import LLM, SamplingParams
from tests.core.checkpoints import Oracle
from tests.core.running import check, engine_of, greedy, recorded


def start(oracle: Oracle, **options: Any) -> LLM:
    return LLM(str(oracle("plain").folder), **{"dtype": "float32", "num_kv_blocks": 256, "block_size": 4} | options)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_kv_blocks", [25, 256])
def test_slots_are_reused(oracle: Oracle, overlap: bool, num_kv_blocks: int) -> None:
    """Three slots serve everyone, and are never shared or lost, with preemption as well."""
    llm = start(oracle, max_num_seqs=3, overlap=overlap, num_kv_blocks=num_kv_blocks)
    executor = engine_of(llm).executor
    inputs, update = executor.inputs, executor.inputs.update
    used: list[list[int]] = []

    def watch(batch: Any) -> Any:
        slots, any_new = update(batch)
        used.append(slots.tolist())
        holding = {s.request_id: s.slot for r in engine_of(llm).requests.values() for s in r.sequences if s.slot >= 0}
        assert len(set(holding.values())) == len(holding)
        assert set(holding.values()).isdisjoint(inputs.free_slots)
        assert len(holding) + len(inputs.free_slots) == 3
        for sequence, slot in zip(batch.sequences, slots, strict=True):
            assert inputs.tables.blocks_RB[slot, : len(sequence.block_table)].tolist() == sequence.block_table
        return slots, any_new

    inputs.update = watch  # type: ignore[method-assign]
    check(llm, oracle("plain"))
    assert all(len(set(slots)) == len(slots) for slots in used)
    assert torch.equal(executor.runner.slots.block_tables_RB, torch.from_numpy(inputs.tables.blocks_RB))
    assert sorted(inputs.free_slots) == [0, 1, 2]
    assert (llm.stats.num_preemptions > 0) == (num_kv_blocks == 25)


def test_only_what_changed_in_slots_is_sent(oracle: Oracle) -> None:
    """Parameters of a sequence once, each entry of its block table once; most decode steps change nothing."""
    llm = start(oracle, max_num_seqs=3)
    executor, steps = engine_of(llm).executor, []
    execute = executor._execute
    executor._execute = lambda step: (steps.append(step), execute(step))[1]  # type: ignore[method-assign]
    check(llm, oracle("plain"))
    prompts = oracle("plain").prompts
    assert sum(step.params_3C.shape[1] for step in steps) == len(prompts)
    assert sum(step.tables_2C.shape[1] for step in steps) == sum(-(-(len(prompt) + 19) // 4) for prompt in prompts)
    state, sampler = executor.runner.slots, executor.sampler
    assert torch.equal(state.temperature_R[:3], torch.from_numpy(sampler.temperature[:3]))
    assert torch.equal(state.seed_R[:3], torch.from_numpy(sampler.seed[:3]))


def test_a_reused_slot_has_the_new_requests_parameters(oracle: Oracle) -> None:
    llm = start(oracle, max_num_seqs=1)
    prompt = oracle("plain").prompts[4]
    wild = SamplingParams(temperature=5.0, top_k=3, seed=9, max_tokens=20, ignore_eos=True)
    outputs = llm.generate([prompt] * 3, [greedy(), wild, greedy()], use_tqdm=False)
    assert outputs[0]["token_ids"] == outputs[2]["token_ids"] == oracle("plain").outputs[4]
    assert outputs[1]["token_ids"] != outputs[0]["token_ids"]


def test_counters(oracle: Oracle) -> None:
    llm = start(oracle, block_manager="plain")
    prompts = oracle("plain").prompts
    with recorded(llm) as batches:
        outputs = check(llm, oracle("plain"))
    stats = llm.stats
    assert stats.num_steps == len(batches)
    assert stats.num_output_tokens == 20 * len(prompts)
    # All tokens but each request's last go through the model; a prompt of one token counts as a decode.
    assert stats.num_prefill_tokens + stats.num_decode_tokens == sum(len(p) + 19 for p in prompts)
    assert stats.num_prefill_tokens == sum(len(p) for p in prompts if len(p) > 1)
    assert (stats.num_preemptions, stats.num_hit_tokens) == (0, 0)
    for output in outputs:
        metrics = output.metrics
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time
        assert metrics.ttft == metrics.first_token_time - metrics.arrival_time
        assert output.finished
        assert output.num_cached_tokens == 0


def test_prefix_cache_counters(oracle: Oracle) -> None:
    llm = start(oracle)
    prompt = oracle("plain").prompts[7]
    for _ in range(2):
        llm.generate(prompt, greedy(1), use_tqdm=False)
    assert (llm.stats.num_queried_tokens, llm.stats.num_hit_tokens) == (62, 28)


def test_outputs_come_in_the_order_of_the_prompts(oracle: Oracle) -> None:
    llm = start(oracle, max_num_seqs=4)
    prompts = oracle("plain").prompts
    params = [greedy(20 - index) for index in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output["token_ids"]) for output in outputs] == [20 - index for index in range(len(prompts))]


def test_progress_bar(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    llm = start(oracle)
    llm.generate(oracle("plain").prompts, greedy(3))
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "prefill" in shown
    assert "decode" in shown
    llm.generate(oracle("plain").prompts, greedy(3), use_tqdm=False)
    assert capsys.readouterr().err == ""
